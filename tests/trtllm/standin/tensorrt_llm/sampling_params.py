from dataclasses import dataclass, field, make_dataclass

from tensorrt_llm.standin.flavour import since


@dataclass(slots=True, kw_only=True)
class GuidedDecodingParams:
    json: object = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None


@dataclass(slots=True, kw_only=True)
class _Common:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: object = None
    bad_token_ids: list[int] | None = None
    stop: object = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    embedding_bias: object = None
    logits_processor: object = None
    apply_batched_logits_processor: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_reset_ids: int | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    beam_search_diversity_rate: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: int | None = None
    min_p: float | None = None
    beam_width_array: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = False
    additional_model_outputs: list | None = None
    lookahead_config: object = None
    guided_decoding: GuidedDecodingParams | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


_LATER = ["logprobs_mode", "logprobs_simple_format"] if since("1.3") else []

SamplingParams = make_dataclass(
    "SamplingParams",
    [(name, object, field(default=None)) for name in _LATER],
    bases=(_Common,),
    namespace={"__module__": __name__},
    kw_only=True,
    slots=True,
)
