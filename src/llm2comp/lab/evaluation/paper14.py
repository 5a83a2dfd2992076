"""The paper's 14 MTEB tasks: versions, the figure that it reports of each, instructions.

Versions are the un-suffixed ones, as in mteb 1.12.58 which the paper used. Two main scores were
renamed since: pair classification was the average precision by cosine, reranking the MAP.
Instructions are those that LLM2Vec publishes for its MTEB runs (task_to_instructions.json of its
repository); the paper's own are not in its release.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperTask:
    """One task: `metric` is mteb 2's key of the figure in the paper's table.

    `subset` is the one language subset that the table counts.
    """

    name: str
    metric: str
    instruction: str
    subset: str = "default"


_SIMILAR = "Retrieve semantically similar text"

PAPER14: dict[str, PaperTask] = {
    task.name: task
    for task in (
        PaperTask(
            "BiorxivClusteringS2S",
            "v_measure",
            "Identify the main category of Biorxiv papers based on the titles",
        ),
        PaperTask(
            "MedrxivClusteringS2S",
            "v_measure",
            "Identify the main category of Medrxiv papers based on the titles",
        ),
        PaperTask(
            "TwentyNewsgroupsClustering",
            "v_measure",
            "Identify the topic or theme of the given news articles",
        ),
        PaperTask(
            "SciFact",
            "ndcg_at_10",
            "Given a scientific claim, retrieve documents that support or refute the claim",
        ),
        PaperTask(
            "NFCorpus",
            "ndcg_at_10",
            "Given a question, retrieve relevant documents that best answer the question",
        ),
        PaperTask("ArguAna", "ndcg_at_10", "Given a claim, find documents that refute the claim"),
        PaperTask("STS17", "cosine_spearman", _SIMILAR, subset="en-en"),
        PaperTask("SICK-R", "cosine_spearman", _SIMILAR),
        PaperTask("STSBenchmark", "cosine_spearman", _SIMILAR),
        PaperTask(
            "Banking77Classification",
            "accuracy",
            "Given a online banking query, find the corresponding intents",
        ),
        PaperTask(
            "EmotionClassification",
            "accuracy",
            "Classify the emotion expressed in the given Twitter message into one of the six "
            "emotions: anger, fear, joy, love, sadness, and surprise",
        ),
        PaperTask(
            "SprintDuplicateQuestions",
            "cosine_ap",
            "Retrieve duplicate questions from Sprint forum",
        ),
        PaperTask(
            "StackOverflowDupQuestions",
            "map_at_1000",
            "Retrieve duplicate questions from StackOverflow forum",
        ),
        PaperTask(
            "SciDocsRR",
            "map_at_1000",
            "Given a title of a scientific paper, retrieve the titles of other relevant papers",
        ),
    )
}
