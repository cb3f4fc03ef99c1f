"""The types of rows have the columns of their files."""

from typing import get_type_hints

import pyarrow as pa
import pytest

from nightshift.data import schemas
from nightshift.data.schemas import ALL_SCORES, SCORES
from tasks.decontaminate.hits import HITS_SCHEMA, Hit


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        (schemas.Message, pa.schema(schemas.MESSAGES.value_type.fields)),
        (schemas.Example, schemas.EXAMPLES),
        (schemas.GroupedExample, schemas.GROUPED),
        (schemas.ConnectedExample, schemas.CONNECTED),
        (schemas.AugmentedExample, schemas.AUGMENTED),
        (schemas.ItemScore, SCORES),
        (schemas.Score, ALL_SCORES),
        (Hit, HITS_SCHEMA),
    ],
)
def test_a_row_type_has_the_columns_of_its_file(row: type, schema: pa.Schema) -> None:
    assert set(get_type_hints(row)) == set(schema.names)
