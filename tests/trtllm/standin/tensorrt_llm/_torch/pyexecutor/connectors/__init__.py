from tensorrt_llm.standin.flavour import since

if not since("1.3"):
    raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
