"""Text on one side, token ids on the other: vocabulary, chat template, and the way back.

Knows nothing of HTTP, requests or workers. Start with `vocabulary.py` (`load.py` makes one);
`continuation.py` is what every generated token passes through.
"""

from gateway.text.continuation import Continuation
from gateway.text.errors import ModelUnreadable, TemplateFailed, TemplateMissing
from gateway.text.load import load_text
from gateway.text.stops import StopStrings
from gateway.text.vocabulary import Vocabulary

__all__ = [
    "Continuation",
    "ModelUnreadable",
    "StopStrings",
    "TemplateFailed",
    "TemplateMissing",
    "Vocabulary",
    "load_text",
]
