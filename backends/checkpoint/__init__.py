"""Reading a checkpoint: its architecture, its identity and its tensors, whatever the file format.

numpy only, for every engine that loads weights itself. Start with `spec.py` (the nouns), then
`opening.py`. Nothing in a file is trusted.
"""
