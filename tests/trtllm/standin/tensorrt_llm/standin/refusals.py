"""What the library does not do together with a connector."""


def refuse(args):
    """Raise as the library does."""
    if args.kv_connector_config is None:
        return
    for reason, wrong in {
        "KV connector is not supported with pipeline parallelism": args.pipeline_parallel_size > 1,
        "KV connector is not supported with context parallelism": args.context_parallel_size > 1,
        "KV connector is not supported with beam search": args.max_beam_width > 1,
        "KV connector is not supported with attention DP": args.enable_attention_dp,
        "KV connector is not supported with host offloading": bool(
            args.kv_cache_config.host_cache_size
        ),
        "KV connector is not supported with variable windows": len(
            set(args.kv_cache_config.max_attention_window or ())
        )
        > 1,
        "KV connector needs GUARANTEED_NO_EVICT": args.scheduler_config.capacity_scheduler_policy
        != "GUARANTEED_NO_EVICT",
        "KV connector is not supported with speculative decoding": args.speculative_config
        is not None,
    }.items():
        if wrong:
            raise NotImplementedError(reason)
