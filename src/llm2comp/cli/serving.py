"""The command that serves an encoder."""

from __future__ import annotations

from llm2comp.cli.embed_options import BackendOption
from llm2comp.cli.options import (
    USE,
    DeviceOption,
    DtypeOption,
    MemoryOption,
    TokensOption,
    app,
    require_model,
)
from llm2comp.cli.serve_options import (
    DeadlineOption,
    HostOption,
    IndexOption,
    KeyFileOption,
    KeyOption,
    LensOption,
    MaxTextsOption,
    NameOption,
    PortOption,
    ServedArgument,
    WaitingOption,
)
from llm2comp.system.console import GENERAL, say

LOOPBACK = "127.0.0.1"


@app.command(rich_help_panel=USE)
def serve(
    model: ServedArgument = None,
    db: IndexOption = None,
    host: HostOption = LOOPBACK,
    port: PortOption = 8000,
    api_key_file: KeyFileOption = None,
    api_key: KeyOption = None,
    name: NameOption = None,
    max_texts: MaxTextsOption = 2048,
    max_waiting_tokens: WaitingOption = None,
    deadline: DeadlineOption = 60.0,
    max_tokens_per_batch: TokensOption = None,
    num_memory: MemoryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    backend: BackendOption = "torch",
    with_lm: LensOption = False,
) -> None:
    """Serve an encoder over HTTP: OpenAI's embeddings, text-embeddings-inference's embed.

    A key may also stand in the environment, as LLM2COMP_API_KEY.
    """
    from llm2comp.use.index.info import require_info
    from llm2comp.use.serve.settings import Keys, Settings, listen

    settings = Settings(
        keys=Keys.read(api_key_file, api_key),
        max_texts=max_texts,
        max_waiting_tokens=max_waiting_tokens,
        deadline_seconds=deadline,
    )
    indexed = require_info(db).model if db else None
    model = model or indexed or GENERAL
    require_model(model)
    place = listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{place.getsockname()[1]}"
    if host != LOOPBACK and not settings.keys.digests:
        say(f"{address}: anyone who reaches it may call it; --api-key-file asks for a key")
    import fastapi  # noqa: F401  # not installed: said before the model is loaded

    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.storage.loading import load
    from llm2comp.storage.places import live_place
    from llm2comp.use.serve.app import make_server, run

    path = live_place(model) if with_lm else model
    encoder = load(path, device, num_memory, backend, dtype, merged=not with_lm)
    index = None
    if db:
        from llm2comp.use.index.index import Index

        index = Index(db, device=device)
        if model == indexed and (path, backend, num_memory) == (model, "torch", None):
            index.lend(model, encoder)  # one model in memory, not two
    server = make_server(encoder, model, settings, name, max_tokens_per_batch, index, lens=with_lm)
    say(f"{address}: {server.engine.name}, {server.engine.width} dimensions; Ctrl-C ends")
    run(server, place)
