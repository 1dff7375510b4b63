"""What can go wrong between text and tokens. All but the first are the asker's fault."""


class ModelUnreadable(Exception):
    """The model's files cannot be understood; says which and why. Found at start, never later."""


class TemplateMissing(Exception):
    """The model has no chat template, so it can complete texts but not chat."""


class TemplateFailed(Exception):
    """The chat template refuses these messages, or fails on them."""
