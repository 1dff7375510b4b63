"""What the library does not do together with a connector, and says so."""

from tensorrt_llm.standin.flavour import since


def refuse(args):
    """Raise as the library does. 1.2 starts with much that it cannot do."""
    if args.kv_connector_config is None:
        return
    policy = args.scheduler_config.capacity_scheduler_policy
    refused = {
        "KV connector is not supported with pipeline parallelism": args.pipeline_parallel_size > 1,
        "KV connector needs GUARANTEED_NO_EVICT": policy != "GUARANTEED_NO_EVICT",
    }
    if not since("1.3"):
        refused["no speculative decoding"] = args.speculative_config is not None
    else:
        cache = args.kv_cache_config
        windows = set(cache.max_attention_window or ())
        refused |= {
            "KV connector is not supported with context parallelism": args.context_parallel_size
            > 1,
            "KV connector is not supported with beam search": args.max_beam_width > 1,
            "KV connector is not supported with attention DP": args.enable_attention_dp,
            "KV connector is not supported with host offloading": bool(cache.host_cache_size),
            "KV connector is not supported with variable windows": len(windows) > 1,
        }
    for reason, wrong in refused.items():
        if wrong:
            raise NotImplementedError(reason)
