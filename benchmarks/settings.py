"""Every size of the suite: model shapes, batches, lengths, number of pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A causal LM's shape; weights are random.

    `family`: llama or qwen3 (transformers' model_type).
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False


@dataclass(frozen=True)
class Setting:
    """One machine's configuration.

    Lengths are (least, most) text tokens, BOS included; `note` goes into the report.
    """

    name: str
    shape: Shape
    device: str = "cpu"
    dtype: str = "float32"  # of the frozen base on both sides; equal precision
    pairs: int = 5  # interleaved rounds; figures are medians over them
    memory_tokens: int = 8
    pretext_texts: int = 4
    pretext_lengths: tuple[int, int] = (128, 256)
    pretext_steps: int = 2  # per timed unit
    checkpointing: bool = False  # of our pretext step
    ucl_texts: int = 128
    ucl_lengths: tuple[int, int] = (12, 40)
    scl_triples: int = 8  # query, positive, hard negative
    scl_query: tuple[int, int] = (16, 32)
    scl_passage: tuple[int, int] = (48, 128)
    scl_mini_batch: int | None = (
        None  # GradCache in the timed SCL row; None: the whole batch at once
    )
    # triples of the two sides of scl_memory: 16 times as many
    memory_batches: tuple[int, int] = (4, 64)
    memory_mini_batch: int = 4
    kl_positions: int = 768
    data_rows: int = 2_000
    data_batches: int = 3_000
    encode_texts: tuple[int, int, int] = (32, 32, 4)  # short, mixed, long
    encode_batch: int = 8
    search_passages: int = 50_000
    search_questions: int = 20  # per timed unit
    bulk_texts: tuple[int, int] = (1_000, 100_000)  # of the two sides of embed_folder
    note: str = ""


# The LM of the CPU's targets: about 25 M weights in the layers, 33 M in embeddings and head.
SMALL_LLAMA = Shape("llama", 8, 512, 1376, 8, 8, 64, 32_000)
TINY_LLAMA = Shape("llama", 2, 128, 352, 4, 4, 32, 4_000)
SMOLLM2_135M = Shape("llama", 30, 576, 1536, 9, 3, 64, 49_152, tied=True)
LLAMA2_7B = Shape("llama", 32, 4096, 11_008, 32, 32, 128, 32_000)
QWEN3_06B = Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151_936, tied=True)

CPU = Setting("cpu", SMALL_LLAMA)
QUICK = replace(
    CPU,
    name="quick",
    shape=TINY_LLAMA,
    pairs=3,
    pretext_lengths=(48, 96),
    ucl_texts=16,
    scl_triples=6,
    kl_positions=512,
    data_rows=200,
    data_batches=50,
    encode_texts=(16, 16, 3),
    search_passages=1_000,
    search_questions=5,
    bulk_texts=(10, 1_000),
    note="a tiny model: shows that every row runs and that its sides agree; the targets are "
    "for the full shape",
)
CPU_135M = replace(
    CPU,
    name="cpu-135m",
    shape=SMOLLM2_135M,
    pairs=3,
    ucl_texts=16,
    scl_triples=8,
    scl_query=(8, 24),
    scl_passage=(24, 64),
    pretext_lengths=(64, 128),
    note="the shape of SmolLM2-135M",
)
CPU_135M_BF16 = replace(
    CPU_135M,
    name="cpu-135m-bf16",
    dtype="bfloat16",
    note="the shape of SmolLM2-135M, bfloat16 weights",
)
CUDA_7B = Setting(
    "cuda-7b",
    LLAMA2_7B,
    device="cuda",
    dtype="bfloat16",
    pretext_lengths=(512, 512),
    pretext_steps=4,
    checkpointing=True,
    scl_triples=256,
    scl_query=(16, 64),
    scl_passage=(64, 256),
    scl_mini_batch=64,
    memory_batches=(64, 1024),
    memory_mini_batch=32,
    kl_positions=2048,
    data_rows=20_000,
    encode_texts=(1024, 512, 128),
    encode_batch=64,
    note="bfloat16 on both sides",
)
CUDA_06B = replace(
    CUDA_7B,
    name="cuda-0.6b",
    shape=QWEN3_06B,
    checkpointing=False,
    scl_mini_batch=None,
    scl_triples=128,
)

SETTINGS = {
    setting.name: setting for setting in (CPU, QUICK, CPU_135M, CPU_135M_BF16, CUDA_7B, CUDA_06B)
}
