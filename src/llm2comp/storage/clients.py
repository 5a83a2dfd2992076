"""Lines for clients that do not put the stored prompts before texts by themselves."""

from __future__ import annotations

from collections.abc import Mapping

from llm2comp.system.files import to_json


def client_lines(folder: str, prompts: Mapping[str, str | None]) -> dict[str, str]:
    """Name of a client → the Python that makes it embed as `encode_query` and `encode_document`.

    Empty without prompts.
    """
    query, document = (prompts.get(role) or "" for role in ("query", "document"))
    if not query and not document:
        return {}
    texts = (folder, query, document)
    where, before, behind = (to_json(text, ensure_ascii=False) for text in texts)
    lang = [
        f'{role}encode_kwargs={{"prompt_name": "{name}"}}'
        for role, name, prompt in (("query_", "query", query), ("", "document", document))
        if prompt
    ]
    llama = [
        f"{name}_instruction={to_json(prompt, ensure_ascii=False)}"
        for name, prompt in (("query", query), ("text", document))
        if prompt
    ]
    return {
        "LangChain": (
            "from langchain_huggingface import HuggingFaceEmbeddings\n\n"
            f"embeddings = HuggingFaceEmbeddings(model_name={where}, {', '.join(lang)})"
        ),
        "LlamaIndex": (
            "from llama_index.embeddings.huggingface import HuggingFaceEmbedding\n\n"
            f"embeddings = HuggingFaceEmbedding({where}, {', '.join(llama)})"
        ),
        "Haystack": (
            "from haystack_integrations.components.embedders import sentence_transformers as st\n\n"
            f"queries = st.SentenceTransformersTextEmbedder(model={where}, prefix={before})\n"
            f"texts = st.SentenceTransformersDocumentEmbedder(model={where}, prefix={behind})"
        ),
        "Chroma": (
            "from sentence_transformers import SentenceTransformer\n\n"
            f"model = SentenceTransformer({where})\n"
            "collection.query(query_embeddings=model.encode_query([question]).tolist())"
        ),
    }
