import itertools

_numbers = itertools.count(1 << 41)


def get_global_disagg_request_id(node_id, process_id=0):
    return next(_numbers)
