"""The place of a process, from what its launcher wrote into the environment."""

import pytest

from eagle_train.dist import Place, place_from_env

SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    "SLURM_NTASKS": "16",
}


def test_without_a_launcher_there_is_one_process():
    assert place_from_env({}) == Place(rank=0, local_rank=0, world_size=1)


def test_torchrun():
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}
    assert place_from_env(env) == Place(rank=3, local_rank=1, world_size=4, master_addr="host", master_port=1234)


def test_every_task_of_an_srun_step_is_a_rank():
    place = place_from_env(SRUN)
    assert (place.rank, place.local_rank, place.world_size, place.master_addr) == (9, 1, 16, "10.0.0.7")
    assert place.master_port == place_from_env(SRUN | {"SLURM_PROCID": "2"}).master_port > 1024


def test_a_batch_script_outside_srun_is_one_process():
    assert place_from_env({"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}).world_size == 1


def test_an_address_given_by_the_user_wins():
    assert place_from_env(SRUN | {"MASTER_ADDR": "login"}).master_addr == "login"


@pytest.mark.parametrize("job", ["1", "999999"])
def test_ports_stay_in_range(job):
    assert 20000 <= place_from_env(SRUN | {"SLURM_JOB_ID": job}).master_port < 40000
