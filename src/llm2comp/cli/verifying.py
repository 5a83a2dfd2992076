"""Commands about an encoder as a folder: export, verify."""

from __future__ import annotations

from llm2comp.cli.export_options import (
    EngineOption,
    MultiVectorOption,
    OpenvinoOption,
    OutArgument,
    PoolingOption,
    StoredDtypeOption,
)
from llm2comp.cli.options import USE, MemoryOption, ModelOption, app, require_folder
from llm2comp.cli.verify_options import (
    CheckedArgument,
    KeyOption,
    NameOption,
    PromptsOption,
    UrlOption,
)
from llm2comp.errors import ModelFolderError
from llm2comp.system.console import GENERAL, say


@app.command(rich_help_panel=USE)
def export(
    out: OutArgument,
    model: ModelOption = GENERAL,
    num_memory: MemoryOption = None,
    multi_vector: MultiVectorOption = False,
    dtype: StoredDtypeOption = "auto",
    pooling: PoolingOption = None,
    openvino: OpenvinoOption = None,
    engine: EngineOption = "sentence-transformers",
) -> None:
    """Write an encoder as a folder that plain sentence-transformers loads, or another engine.

    A run has one already: model/.
    """
    from llm2comp.system.folders import EXPORTED, refuse_foreign

    refuse_foreign(out, EXPORTED)
    if multi_vector and (pooling or engine != "sentence-transformers"):
        fix = "leave --pooling and --for out"
        raise ModelFolderError("keeps every memory state", where="--multi-vector", fix=fix)
    if openvino and engine != "sentence-transformers":
        raise ModelFolderError(
            "adds a graph for sentence-transformers", where="--openvino", fix="leave --for out"
        )
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.storage.compiled import compile_folder, runtime_of
    from llm2comp.storage.export import export as write_folder
    from llm2comp.storage.loading import card_facts, load
    from llm2comp.storage.places import live_place

    if openvino:
        runtime_of("openvino", openvino)  # not installed: said before the work
    stored = None if dtype == "auto" else dtype
    if num_memory and pooling is None:
        pooling = "mean"  # of so many, as asked for
    encoder, facts = load(live_place(model), "cpu", num_memory), card_facts(model)
    write_folder(encoder, out, facts, multi_vector, stored, pooling, engine)
    kind = "MultiVectorEncoder" if multi_vector else "SentenceTransformer"
    use = {
        "sentence-transformers": f"load it with {kind}({str(out)!r})",
        "tei": f"text-embeddings-router --model-id {out}",
        "vllm": f"vllm serve {out} --runner pooling",
        "llama.cpp": f"start llama-server as {out / 'README.md'} says",
    }
    say(f"{out}: {use[engine]}")
    if openvino:
        say(
            f"{out / 'openvino'}: {openvino}, lowest cosine "
            f"{compile_folder(out, 'openvino', openvino):.7f}"
        )


@app.command(rich_help_panel=USE)
def verify(
    folder: CheckedArgument,
    url: UrlOption = None,
    prompts: PromptsOption = "server",
    model_name: NameOption = None,
    key: KeyOption = None,
) -> None:
    """Check that a folder, or a server of it, gives the embeddings of when it was written."""
    require_folder(folder)
    if url is None and (model_name or prompts != "server"):
        raise ModelFolderError("belongs to --url", where="--model-name, --prompts")
    from llm2comp.storage.endpoint import require_address

    if url is not None:
        require_address(url)
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.storage.certificate import verify_url
    from llm2comp.storage.golden import verify as check
    from llm2comp.storage.places import model_folder

    folder = model_folder(folder)
    if url is None:
        say(f"{folder}: sound, lowest cosine {check(folder):.7f}")
        return
    found = verify_url(folder, url, prompts, model_name, key)
    print(found.told())
    if not found.sound:
        raise ModelFolderError(
            "gives other embeddings than the folder's",
            where=found.endpoint.url,
            found=f"lowest cosine {found.lowest:.7f}",
            fix=f"likely cause: {'; '.join(found.causes)} (docs/clients.md)",
        )
    say(f"{found.endpoint.url}: gives the folder's embeddings, lowest cosine {found.lowest:.7f}")
