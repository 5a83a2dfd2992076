"""The prompts of published encoders, word for word: they are the methods; a text within one."""

from __future__ import annotations

TEXT = "{text}"

# Echo embeddings, arXiv 2402.15449.
ECHO = "Rewrite the sentence: {text}, rewritten sentence: {text}"
# PromptEOL, arXiv 2307.16645.
PROMPT_EOL = 'This sentence : "{text}" means in one word:"'
# MetaEOL, arXiv 2402.18458: `task_prompts` in evaluation.py of github.com/Yibin-Lei/MetaEOL, with
# {text} for `*sent 0*`.
META_EOL = (
    "In this task, you're presented with a text excerpt. Your task is to categorize the "
    "excerpt into a broad category such as "
    "'Education', 'Technology', 'Health', 'Business', 'Environment', 'Politics', or "
    "'Culture'. These categories help in "
    "organizing content for better accessibility and targeting. For this task, this "
    'sentence : "{text}" should be '
    'classified under one general category in one word:"',
    "In this task, you're given a statement and you need to determine whether it's "
    "presenting an 'Opinion' or a 'Fact'. This "
    "distinction is vital for information verification, educational purposes, and "
    "content analysis. For this task, this "
    'sentence : "{text}" discriminates between opinion and fact in one word:"',
    "In this task, you're given a review from an online platform. Your task is to "
    "generate a rating for the product based on "
    "the review on a scale of 1-5, where 1 means 'extremely negative' and 5 means "
    "'extremely positive'. For this task, this "
    'sentence : "{text}" reflects the sentiment in one word:"',
    "In this task, you're reading a personal diary entry. Your task is to identify the "
    "predominant emotion expressed, such as "
    'joy, sadness, anger, fear, or love. For this task, this sentence : "{text}" conveys '
    'the emotion in one word:"',
    "In this task, you're presented with two sentences. Your task is to assess whether "
    "the sentences convey the same meaning. "
    "Use 'identical', 'similar', 'different', or 'unrelated' to describe the "
    "relationship. To enhance the performance of this "
    'task, this sentence : "{text}" means in one word:"',
    "In this task, you're given a sentence and a phrase. Your task is to determine if "
    "the phrase can be a contextual synonym "
    "within the given sentence. Options include 'yes', 'no', or 'partially'. To enhance "
    "the performance of this task, this "
    'sentence : "{text}" means in one word:"',
    "In this task, you're examining a news article. Your task is to extract the most "
    "critical fact from the article. For this "
    'task, this sentence : "{text}" encapsulates the key fact in one word:"',
    "In this task, you're reviewing a scientific abstract. Your task is to identify the "
    "main entities (e.g., proteins, "
    "diseases) and their relations (e.g., causes, treats). For this task, this sentence "
    ': "{text}" highlights the primary '
    'entity or relation in one word:"',
)


def fill(template: str, text: str) -> tuple[str, list[tuple[int, int]]]:
    """The template with the text in place of every {text}, and where these copies begin and end."""
    string, *rest = template.split(TEXT)
    copies = []
    for part in rest:
        copies.append((len(string), len(string) + len(text)))
        string += text + part
    return string, copies


def as_sentence(text: str) -> str:
    """The text as PromptEOL's and MetaEOL's code quotes it (`BaselineSettings.as_sentence`)."""
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text
