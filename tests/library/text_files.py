"""Content of files of texts."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq


def parquet(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def objects(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)
