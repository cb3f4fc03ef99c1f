"""Chat templates by name: prompt formats of base models here, those of instruct models from TRL."""

import importlib.util
from pathlib import Path

from nightshift.core.config import suggestion
from nightshift.core.files import read_json
from nightshift.core.paths import BASE, BASE_RECORD

OWN = Path(__file__).parent / "chat_templates"
# Between an instruction and its input in Alpaca's prompt: `input_separator` of such a source.
ALPACA_SEPARATOR = "\n\n### Input:\n"


def list_templates() -> dict[str, Path]:
    """Return name -> file of the chat templates that are known by name."""
    spec = importlib.util.find_spec("trl")
    folders = [*(spec.submodule_search_locations or [] if spec else [])]
    files = [file for folder in folders for file in sorted(Path(folder, "chat_templates").glob("*.jinja"))]
    # A training template renders other prompts than the model is asked with.
    known = {file.stem: file for file in files if not file.stem.endswith("_training")}
    return known | {file.stem: file for file in sorted(OWN.glob("*.jinja"))}


def find_template(reference: str) -> Path:
    """Return the file of a chat template.

    Args:
        reference: Name of a template, or path of a file.

    Raises:
        ValueError: There is neither.

    Example:
        >>> find_template("chatml").name
        'chatml.jinja'
    """
    known = list_templates()
    if reference in known:
        return known[reference]
    if Path(reference).is_file():
        return Path(reference)
    near = suggestion(reference, list(known))
    raise ValueError(f"{reference!r} is neither a file nor the name of a chat template; {near}")


def is_template_edited(reference: str | None) -> bool:
    """Return whether a template file is not the one that the saved base has, although its path is."""
    saved = BASE / "chat_template.jinja"
    if reference is None or reference in list_templates() or not (BASE_RECORD.is_file() and saved.is_file()):
        return False
    if read_json(BASE_RECORD).get("chat_template") != reference:
        return False
    # Imports Jinja, which the command line need not wait for.
    from nightshift.data.template import freeze_dates

    source = Path(reference).read_text(encoding="utf-8")
    return saved.read_text(encoding="utf-8") != freeze_dates(source)
