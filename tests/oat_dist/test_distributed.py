"""Leaving the process group."""

import pytest
import torch.distributed as dist

from oat_dist.distributed import World


@pytest.mark.parametrize("error", [None, RuntimeError, SystemExit])
def test_ranks_leave_the_process_group_however_the_work_ends(error):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with World():
            if error is not None:
                raise error
    except (RuntimeError, SystemExit) as raised:
        assert type(raised) is error
    assert not dist.is_initialized()
