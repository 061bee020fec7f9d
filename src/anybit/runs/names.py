"""Names of the files in a run folder."""

from anybit.runs.names import SUPERNET as SUPERNET

MODEL = "model.safetensors"


REPORT = "report.json"
SEARCH = "search.json"


CHECKPOINT = "checkpoint.safetensors"
RUN_FILES = {
    "scheme.json",
    "model.safetensors",
    REPORT,
    "candidates.safetensors",
    "candidates.json",
    "report.html",
    SUPERNET,
    "supernet.json",
    SEARCH,
    CHECKPOINT,
    f".{CHECKPOINT}.tmp",
}

SUPERNET = "supernet.safetensors"
SUPERNET_JSON = "supernet.json"
