"""Find names and places with Presidio and a spaCy model, in addition to the rules (extra `presidio`).

Only the model's entities are requested: Presidio's own rules would fetch domain lists over the network.
"""

from nightshift.core.errors import ConfigError
from nightshift.core.state import user_path
from nightshift.raw.pii import Find, Finding, find_pii

KINDS = {"PERSON": "person", "LOCATION": "location"}


def load_presidio(model: str) -> Find:
    """Return a function that finds the matches of the rules, persons and locations.

    Args:
        model: Name of an installed spaCy model, or its folder.

    Raises:
        ConfigError: Presidio or the model is not installed; nothing is downloaded.
    """
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer
    except ImportError as err:
        raise ConfigError(f"ingest.pii_model: {err}; run `pip install -e '.[presidio]'`") from err
    if not spacy.util.is_package(model):
        folder = user_path(model)
        if not folder.is_dir():
            raise ConfigError(f"ingest.pii_model: no spaCy model {model!r}; run `spacy download {model}`")
        model = str(folder)
    # The language is only a label that links model and recogniser.
    nlp = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": model}])
    registry = RecognizerRegistry(recognizers=[SpacyRecognizer()], supported_languages=["en"])
    engine = AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=["en"])

    def find(text: str) -> list[Finding]:
        found = find_pii(text)
        for one in engine.analyze(text, language="en", entities=list(KINDS)):
            if all(one.end <= other.start or other.end <= one.start for other in found):
                found.append(Finding(KINDS[one.entity_type], one.start, one.end))
        return sorted(found, key=lambda finding: finding.start)

    return find
