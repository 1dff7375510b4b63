"""A request as the executor keeps it."""

from tensorrt_llm.bindings.internal.batch_manager import LlmRequest


class PyRequest(LlmRequest):
    """What the executor keeps, with the attributes that its C++ half has not."""

    def __init__(self, client, tokens, params, disagg, salt, *, number, chunk):
        own = getattr(disagg, "disagg_request_id", None)
        super().__init__(own or number, tokens, params["max_tokens"], chunk, salt=salt)
        self.py_request_id = self.request_id
        self.py_disaggregated_params = disagg
        self.is_attention_dp_dummy = False
        self.client, self.params, self.salt = client, params, salt
        self.blocks, self.generated, self.cancelled = [], [], False
        self.reused = 0

    def seen(self):
        """The C++ half alone."""
        base = LlmRequest.__new__(LlmRequest)
        own = ("client", "params", "salt", "blocks", "generated", "cancelled")
        base.__dict__.update(
            (name, value)
            for name, value in self.__dict__.items()
            if not name.startswith("py_") and name not in (*own, "reused", "is_attention_dp_dummy")
        )
        return base
