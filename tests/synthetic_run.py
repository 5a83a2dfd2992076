"""A run folder with made-up figures in the shapes of a real one: what `llm2comp report` reads,
without training.
"""

import json

import numpy as np

from llm2comp.recipe import load_recipe
from llm2comp.runs.folder import FOLDERS

D, K, WATCHES = 192, 8, 6
WARNING = "the synthetic rank falls"


def write_run(folder, overrides=(), seed=0, watch=True, scores=True, unfinished=()):
    """A run of the demo's recipe; `unfinished`: stages that stopped half-way.

    Returns the folder.
    """
    recipe = load_recipe("tiny", overrides)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    write_json(
        folder / "environment.json",
        {
            "python": "3.11.7",
            "machine": "Synthetic x86_64, 2 cores",
            "device": "cpu",
            "packages": {"llm2comp": "0.1.0", "torch": "2.13.0"},
            "command": ["llm2comp", "train", "recipes/tiny.yaml", "name=a b"],
            "started": "2026-01-02T03:04:05+0000",
        },
    )
    rng = np.random.default_rng(seed)
    for number, (name, stage) in enumerate(recipe.stages.items()):
        reached = stage.steps // 2 if name in unfinished else stage.steps
        steps = sorted({1, *range(10, reached + 1, 10)})
        write_lines(
            folder / FOLDERS[name] / "metrics.jsonl", [metrics(step, rng) for step in steps]
        )
        if watch:
            watched = sorted({round(step) for step in np.linspace(0, reached, WATCHES)})
            write_lines(
                folder / FOLDERS[name] / "watch.jsonl",
                [figures(s, number + s / stage.steps, rng) for s in watched],
            )
        if name in unfinished:
            break
        write_json(
            folder / FOLDERS[name] / "done.json",
            {"inputs": "ab", "steps": reached, "seconds": 61.2 + number},
        )
    if scores:
        write_scores(folder / "scores", rng)
    return folder


def metrics(step, rng):
    """A line of metrics.jsonl."""
    loss = float(4 * np.exp(-step / 25) + 0.4 + 0.1 * rng.random())
    return {
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3 / step,
        "grad_norm": 1.5,
        "tokens_per_second": 1870.5,
    }


def figures(step, course, rng):
    """A line of watch.jsonl; `course` goes from 0 before training to 3 after the last stage."""
    low = np.exp(-np.arange(K)[:, None] / 3) @ rng.random((1, 24)) + 0.25 * (
        1 + course
    ) * rng.standard_normal((K, 24))
    low /= np.linalg.norm(low, axis=1, keepdims=True)
    return {
        "step": step,
        "loss": float(2 / (1 + course)),
        "context_recovered": float(0.2 + 0.1 * course + 0.01 * rng.random()),
        "effective_rank": float(24 + 9 * course - 3 * rng.random()),
        "participation_ratio": float(11 + 4 * course - rng.random()),
        "uniformity": float(-1.2 - 0.7 * course),
        "alignment": float(0.9 - 0.15 * course),
        "anisotropy": float(0.6 / (1 + course)),
        "texts": 256,
        "memory_correlation": (low @ low.T).tolist(),
        "spectrum": (0.3 * np.arange(1, D + 1) ** (-2.2 + 0.4 * course)).tolist(),
        "tasks": {"Local-STSBenchmark": 0.55 + 0.05 * course, "Local-MRPC": 0.7 + 0.02 * course},
        "seconds": 3.2,
        "warnings": [f"{WARNING}: 33.1 at step 0, now {30 - step / 10:.1f}"]
        if step and course < 1
        else [],
        "best": False,
    }


def write_scores(folder, rng):
    """The demo's scores and those of an evaluation, with one failure."""
    names = ("backbone, mean-pooled", "after CTKD", "after UCL", "after SCL")
    rows = [
        {
            "model": name,
            "ndcg_at_10": 0.08 + 0.09 * i,
            "mrr_at_10": 0.06 + 0.08 * i,
            "effective_rank": 23.8 + 8 * i,
        }
        for i, name in enumerate(names)
    ]
    rows.append(
        {"model": "BM25", "ndcg_at_10": 0.6192, "mrr_at_10": 0.5799, "effective_rank": None}
    )
    write_json(folder / "python-docs.json", rows)
    tasks = {
        "Local-STSBenchmark": "cosine_spearman",
        "Local-MRPC": "max_ap",
        "Local-Cranfield": "ndcg_at_10",
    }
    summary = [
        {
            "model": model,
            "name": f"local/{model}",
            "revision": "ab12",
            "scores": {
                t: {"score": round(float(rng.random()), 4), "metric": m, "split": "test"}
                for t, m in tasks.items()
            },
            "failed": {},
        }
        for model in ("mean-pooled", "demo")
    ]
    del summary[0]["scores"]["Local-Cranfield"]
    summary[0]["failed"]["Local-Cranfield"] = "SYNTHETIC: a document is empty"
    write_json(folder / "summary.json", summary)


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
