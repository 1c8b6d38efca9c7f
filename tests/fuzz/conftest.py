import pytest
import torch.distributed as dist


@pytest.fixture(scope="module", autouse=True)
def _group_of_this_process_alone():
    """For sequence parallelism; tests of other files find no group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
