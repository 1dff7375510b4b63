"""The request as the executor's C++ half knows it: these attributes and no other."""

from tensorrt_llm.bindings import LlmRequestState
from tensorrt_llm.standin.flavour import since


class LlmRequest:
    """Holds one request's state; the executor keeps a subclass, `seen()` is this view of it."""

    def __init__(self, request_id, tokens, max_new_tokens, chunk, *, salt=None, priority=0.5):
        self.request_id = request_id
        self.prompt_len = self.orig_prompt_len = len(tokens)
        self.max_new_tokens = max_new_tokens
        self.state = LlmRequestState.CONTEXT_INIT
        self.context_current_position = 0
        self.context_chunk_size = chunk
        self.is_context_only_request = False
        self.is_generation_only_request = False
        self.is_finished_due_to_length = False
        self.lora_task_id = None
        self.multimodal_hashes = self.multimodal_positions = self.multimodal_lengths = None
        self.kv_cache_retention_config = None
        self.parent_request_id = None
        self.is_child = False
        self.is_dummy_request = False
        if since("main"):
            self.cache_salt = salt
        else:
            self.cache_salt_id = hash(salt) & 0xFFFF if salt else None
        self._tokens = list(tokens)
        self._priority = priority

    def get_tokens(self, beam):
        if beam != 0:
            raise IndexError(beam)
        return list(self._tokens)

    def priority(self):
        return self._priority

    @property
    def is_finished(self):
        return self.state == LlmRequestState.GENERATION_COMPLETE

    @property
    def is_context_finished(self):
        return self.context_current_position >= self.prompt_len

    @property
    def context_remaining_length(self):
        return self.prompt_len - self.context_current_position

    @property
    def is_last_context_chunk(self):
        return self.context_remaining_length <= self.context_chunk_size
