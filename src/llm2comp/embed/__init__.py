"""Texts → embeddings in bulk: long-text policies, batches with progress, files in one step (writing.py).

Each text is tokenised once, all of them before the first is encoded; batches are of like length, and of so many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm2comp.console import Bar
from llm2comp.embed.writing import Embedded, Places, check_output, places_of, rows_file, write_embeddings
from llm2comp.errors import DataError
<<<<<<< HEAD:src/llm2comp/embed.py
from llm2comp.files import refuse_output, to_json, write_bytes
=======
>>>>>>> wt-a:src/llm2comp/embed/__init__.py

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llm2comp.encoder import Frame

__all__ = ["Embedded", "Places", "check_output", "embed", "places_of", "rows_file", "write_embeddings"]

LongTexts = Literal["truncate", "chunk-mean", "error"]
TOKENISE_AT_ONCE = 1000
# Measured on a CPU, where larger batches outgrow its caches; a guess for devices with thousands of cores.
AT_ONCE_ON_CPU, AT_ONCE_ELSEWHERE = 1024, 16_384
# Batches whose embeddings wait on the device until they are fetched together: each time, it is waited for.
FETCH_EVERY = 64
Ids = NDArray[np.int32]


def embed(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    role: Literal["query", "document"] | None = None,
    long_texts: LongTexts = "truncate",
    max_tokens_per_batch: int | None = None,
    normalise: bool = False,
) -> Embedded:
    """Embed texts in order.

    Args:
        model: any sentence-transformers model.
        texts: the texts.
        role: use the model's stored prompt for queries or documents.
        long_texts: what to do with texts over the model's limit: cut them, embed their parts and average
            (each part weighs by its tokens), or stop.
        max_tokens_per_batch: texts are encoded so many tokens at once, padding and memory included; one text at least.
            None = by the device.
        normalise: scale each embedding to length 1.

    Raises:
        DataError: no texts, or one that is not Unicode; a text over the limit under `error`; a prompt that leaves no room;
            an embedding that is not finite.
    """
    from llm2comp.encoder import frame_of, refuse_not_finite

    _check_texts(texts)
    named = role if role in model.prompts else model.default_prompt_name
    prompt: str = (model.prompts.get(named) or "") if named else ""
    frame = frame_of(model)
    room = _room(model, frame, prompt)
    # A text is one part or, under chunk-mean, several: what the model is given, its tokens, its weight in the mean.
    parts = [[prompt + text] for text in texts]
    ids = [[row] for row in _tokenise(model, [prompt + text for text in texts])]
    weights = [[1] for _ in texts]
    long = [i for i, (row,) in enumerate(ids) if len(row) > room]
    if long and long_texts == "error":
        raise _too_long(long, len(ids[long[0]][0]), room, prompt)
    if long_texts == "chunk-mean":
        for i in long:
            pieces = _pieces(model, texts[i], prompt, room)
            parts[i] = [prompt + piece for piece in pieces]
            ids[i] = _tokenise(model, parts[i])
            weights[i] = [len(row) for row in (_tokenise(model, pieces) if prompt else ids[i])]
    flat_ids = [row for rows in ids for row in rows]
    lengths = [min(len(row), room) + (frame.added if frame else 0) for row in flat_ids]
    at_once = max_tokens_per_batch or (AT_ONCE_ON_CPU if model.device.type == "cpu" else AT_ONCE_ELSEWHERE)
    states = _encode(model, frame, [part for group in parts for part in group], flat_ids, lengths, at_once)
    bounds = np.cumsum([0, *(len(group) for group in parts)])
    means = [
        states[a] if b == a + 1 else np.average(states[a:b], axis=0, weights=weights[i])
        for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    embeddings = np.asarray(means, dtype=np.float32)
    refuse_not_finite(embeddings, texts)
    if normalise:
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    return Embedded(embeddings, len(long))


<<<<<<< HEAD:src/llm2comp/embed.py
def write_embeddings(path: Path, embedded: Embedded, texts: Sequence[str], places: Places | None = None) -> None:
    """Write .npy (the matrix), .parquet or .jsonl (columns text, embedding), in one step.

    With `places` that are not `zero` there is a column `row` before these, beside .npy a file `.rows.npy`; with `zero` a text
    that there is not is null.

    Raises:
        DataError: another suffix. RunError: not to be replaced, or cannot be written.
    """
    check_output(path)
    if places and places.zero:
        embedded, texts = _spread(embedded, texts, places)  # type: ignore[assignment]
    rows = {"row": list(places.numbers)} if places and not places.zero else {}
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, embedded.embeddings_ND)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        width = embedded.embeddings_ND.shape[1]
        column = pa.FixedSizeListArray.from_arrays(pa.array(embedded.embeddings_ND.ravel()), width)
        pq.write_table(pa.table({**rows, "text": pa.array(texts, pa.string()), "embedding": column}), buffer)
    else:
        columns = {**rows, "text": texts, "embedding": embedded.embeddings_ND.tolist()}
        lines = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        buffer.write("".join(to_json(line, ensure_ascii=False) + "\n" for line in lines).encode())
    beside = rows_file(path)
    if path.suffix == ".npy":  # row numbers of an earlier file would be wrong beside this one
        beside.unlink(missing_ok=True)
    write_bytes(path, buffer.getvalue())
    if rows and path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(rows["row"], dtype=np.int64))
        write_bytes(beside, buffer.getvalue())


def rows_file(path: Path) -> Path:
    """Where the row numbers of the embeddings in a .npy stand."""
    return path.with_suffix(".rows.npy")


def _spread(embedded: Embedded, texts: Sequence[str], places: Places) -> tuple[Embedded, list[str | None]]:
    """A row for each of the source: zeros and no text where it had none."""
    all_ND = np.zeros((places.rows, embedded.embeddings_ND.shape[1]), dtype=np.float32)
    all_ND[list(places.numbers)] = embedded.embeddings_ND
    all_texts: list[str | None] = [None] * places.rows
    for number, text in zip(places.numbers, texts, strict=True):
        all_texts[number] = text
    return Embedded(all_ND, embedded.long_texts), all_texts


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """See that `write_embeddings` can write, before hours are spent on embedding.

    Raises:
        DataError: another suffix, a folder, no right to write. RunError: one of the inputs, or a file of others.
    """
    if path.suffix not in OUTPUT_FORMATS:
        raise DataError(
            "unknown format", where=str(path), expected=" or ".join(OUTPUT_FORMATS), found=path.suffix or "no suffix"
        )
    home = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not home.is_dir() or not os.access(home, os.W_OK):
        raise DataError("no file can be written there", where=str(path), fix="give another --out")
    refuse_output(path, inputs, _holds_embeddings)
    if path.suffix == ".npy":
        refuse_output(rows_file(path), inputs, _holds_embeddings)


def _holds_embeddings(file: Path) -> bool:
    """Whether a file may be an earlier output."""
    try:
        if file.suffix == ".npy":
            return np.load(file, mmap_mode="r", allow_pickle=False).dtype in (np.float32, np.int64)
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            return "embedding" in pq.read_schema(file).names
        with file.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
        return isinstance(first, dict) and "embedding" in first
    except (OSError, ValueError, EOFError):  # pyarrow's for a file that is no parquet is a ValueError
        return False


=======
>>>>>>> wt-a:src/llm2comp/embed/__init__.py
def _too_long(long: Sequence[int], tokens: int, room: int, prompt: str) -> DataError:
    return DataError(
        f"{len(long):,} texts are longer than the model reads",
        where=f"text {long[0] + 1}",
        expected=f"{room:,} tokens or fewer" + (", prompt included" if prompt else ""),
        found=f"{tokens:,} tokens",
        fix="choose truncate or chunk-mean for long texts",
    )


def _check_texts(texts: Sequence[str]) -> None:
    if not texts:
        raise DataError("nothing to embed", expected="one or more texts", found="none")
    for number, text in enumerate(texts, 1):
        try:
            text.encode("utf-8")
        except (UnicodeEncodeError, AttributeError):  # a byte that did not decode, as in arguments; no string at all
            raise DataError("not a Unicode text", where=f"text {number}", found=ascii(text)[:80]) from None


def _encode(
    model: SentenceTransformer,
    frame: Frame | None,
    texts: Sequence[str],
    ids: Sequence[Ids],
    lengths: Sequence[int],
    max_tokens: int,
) -> NDArray[np.float32]:
    """Longest first, as many at once as keep their padded batch within `max_tokens`; back in order."""
    import torch

    from llm2comp.tokens import longest_first

    out: NDArray[np.float32] | None = None
    waiting: list[tuple[list[int], torch.Tensor]] = []
    batches = list(longest_first(lengths, lambda longest: max_tokens // max(1, longest)))
    model.eval()
    with Bar("embed", len(texts)) as bar, torch.inference_mode():
        for number, places in enumerate(batches, 1):
            if frame:
                found = model(frame.features([ids[i] for i in places], model.device))["sentence_embedding"]
            else:
                batch: Any = [texts[i] for i in places]
                found = model.encode(batch, batch_size=len(batch), prompt="", convert_to_tensor=True, show_progress_bar=False)
            waiting.append((places, found[:, : model.truncate_dim].float()))
            if number % FETCH_EVERY == 0 or number == len(batches):
                fetched = torch.cat([rows for _, rows in waiting]).cpu().numpy()
                out = np.empty((len(texts), fetched.shape[1]), dtype=np.float32) if out is None else out
                out[[i for group, _ in waiting for i in group]] = fetched
                waiting.clear()
            bar.advance(len(places))
    assert out is not None
    return out


def _room(model: SentenceTransformer, frame: Frame | None, prompt: str) -> int:
    """Tokens of prompt and text that fit into one input, beside what the model itself adds (BOS, memory)."""
    limit = model.max_seq_length or 10**9
    around = len(model.tokenizer("", verbose=False)["input_ids"])
    room = frame.room if frame else limit - around
    if room < 1:
        raise DataError("leaves no room for a text", where="max_seq_length", expected=f"{around + 1} or more", found=limit)
    if prompt and len(_tokenise(model, [prompt])[0]) >= room:
        raise DataError("the prompt leaves no room for a text", expected=f"fewer than {room} tokens", found=repr(prompt[:80]))
    return room


def _tokenise(model: SentenceTransformer, texts: Sequence[str]) -> list[Ids]:
    """Token ids of each text, uncut; what the model adds (BOS, memory) not among them."""
    ids: list[Ids] = []
    for start in range(0, len(texts), TOKENISE_AT_ONCE):
        batch = list(texts[start : start + TOKENISE_AT_ONCE])
        found = model.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [np.asarray(row, dtype=np.int32) for row in found]
    return ids


def _pieces(model: SentenceTransformer, text: str, prompt: str, room: int) -> list[str]:
    """A text in parts that each fit behind the prompt, cut between tokens."""
    spans = model.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)["offset_mapping"]
    free = room - (len(_tokenise(model, [prompt])[0]) if prompt else 0)
    parts, begin = [], 0
    while begin < len(spans):
        end = min(begin + free, len(spans))
        # a part may have more tokens than the text had there: its last character whole, its first word without a space
        while end > begin + 1 and len(_tokenise(model, [prompt + text[spans[begin][0] : spans[end - 1][1]]])[0]) > room:
            end -= 1
        parts.append(text[spans[begin][0] : spans[end - 1][1]])
        begin = end
    return parts
