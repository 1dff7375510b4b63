"""Helpers of the library's own tests, by which its releases can be told apart."""

from tensorrt_llm.standin.flavour import since

if since("1.3"):

    def simulate_prefill_completion_only_use_for_testing(llm_request):
        llm_request.context_current_position = llm_request.prompt_len
