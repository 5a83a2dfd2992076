"""All rows by name, in the order of the table."""

from benchmarks.before import BEFORE_ROWS
from benchmarks.bulk import BULK_ROWS
from benchmarks.contrastive import CONTRASTIVE_ROWS
from benchmarks.encoding import ENCODING_ROWS
from benchmarks.parts import PART_ROWS
from benchmarks.searching import SEARCH_ROWS
from benchmarks.sides import Row
from benchmarks.training import TRAINING_ROWS

ROWS: dict[str, Row] = {
    **TRAINING_ROWS,
    **CONTRASTIVE_ROWS,
    **BEFORE_ROWS,
    **ENCODING_ROWS,
    **PART_ROWS,
    **SEARCH_ROWS,
    **BULK_ROWS,
}
