from tensorrt_llm.standin import comm


def mpi_rank():
    return comm.current().rank


def mpi_world_size():
    return comm.current().world


def mpi_broadcast(obj, root=0):
    return comm.current().broadcast(obj, root)


def mpi_allgather(obj):
    return comm.current().allgather(obj)
