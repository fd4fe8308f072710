"""The place of a process, and where ranks meet, from what the launcher wrote into the environment."""

import socket
import struct
import threading
import time
from urllib.parse import urlparse

import pytest
import torch

from eagle_train import slurm
from eagle_train.dist import Place, gpu, meeting_from_env, place_from_env
from eagle_train.meeting import Meeting, announcing, answer, check_alike, find, meet

SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    "SLURM_NTASKS": "16",
}


def test_without_a_launcher_there_is_one_process():
    assert place_from_env({}) == Place(rank=0, local_rank=0, world_size=1)


def test_torchrun():
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}
    assert place_from_env(env) == Place(rank=3, local_rank=1, world_size=4)
    assert meeting_from_env(env | SRUN) == Meeting(address="host", ports=[1234])


def test_every_task_of_an_srun_step_is_a_rank():
    assert place_from_env(SRUN) == Place(rank=9, local_rank=1, world_size=16)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_one_variable_of_torchrun_alone_does_not_lead_the_tasks_of_a_step_elsewhere(name):
    env = SRUN | {name: "3", "MASTER_PORT": ""}
    assert place_from_env(env) == place_from_env(SRUN)
    assert meeting_from_env(env) == meeting_from_env(SRUN)


@pytest.mark.parametrize("address", ["::1", "fd00::2", "10.0.0.1", "n1"])
def test_torch_is_told_an_address_of_either_kind(address):
    url = urlparse(Meeting(address=address, ports=[77]).url())
    assert (url.hostname, url.port) == (address, 77)


def test_a_batch_script_outside_srun_is_one_process():
    assert place_from_env({"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}).world_size == 1


def test_an_address_and_a_port_given_by_the_user_win():
    meeting = meeting_from_env(SRUN | {"MASTER_ADDR": "login", "MASTER_PORT": "77"})
    assert (meeting.address, meeting.ports) == ("login", [77])


def test_a_task_that_sees_its_own_gpu_alone_takes_that():
    assert [gpu(local, 8) for local in range(8)] == list(range(8))
    assert [gpu(local, 1) for local in range(8)] == [0] * 8


@pytest.mark.parametrize("job", ["1", "999999", "4294901760"])
def test_ports_are_those_of_all_tasks_and_below_the_ephemeral_ones(job):
    env = SRUN | {"SLURM_JOB_ID": job}
    ports = slurm.ports(env, 8)
    assert ports == slurm.ports(env | {"SLURM_PROCID": "2"}, 8)
    assert len(set(ports)) == 8 and all(20000 <= port < 32768 for port in ports)


def test_neighbouring_jobs_and_the_steps_of_a_job_begin_at_other_ports():
    starts = [(job, step) for job in range(100, 110) for step in range(4)]
    envs = [SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job, step in starts]
    assert len({slurm.ports(env, 1)[0] for env in envs}) == len(starts)
    tokens = {slurm.step_token(env) for env in envs} | {slurm.step_token(envs[0] | {"SLURM_RESTART_COUNT": "1"})}
    assert len(tokens) == len(starts) + 1


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("login", ["login"]),
        ("n[1-2]", ["n1", "n2"]),
        ("gpu[08-10,2],cpu-x,h1", ["gpu08", "gpu09", "gpu10", "gpu2", "cpu-x", "h1"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
        ("", []),
    ],
)
def test_node_lists_are_expanded(nodes, hosts):
    assert slurm.expand_hosts(nodes) == hosts


def address(env, resolves=False, told=None):
    return slurm.master_address(SRUN | env, lambda host: resolves, lambda node: told)


def test_rank_zero_is_looked_for_on_its_own_node_not_where_srun_was_launched():
    assert address({}, resolves=True) == "n1"
    assert address({}, told="10.0.0.1") == "10.0.0.1"
    assert address({"SLURM_NODE_ALIASES": "n1:10.1.1.1:a,n2:10.1.1.2:b"}, resolves=True) == "10.1.1.1"
    assert address({"SLURM_NODE_ALIASES": "n0:10.1.1.1:a,n1:[fd00::2]:b"}) == "fd00::2"


def test_the_launch_node_is_the_last_resort_and_one_node_needs_no_name():
    assert address({}) == "10.0.0.7"
    assert address({"SLURM_STEP_NODELIST": "n7"}, resolves=True) == "127.0.0.1"


@pytest.fixture
def ports():
    """Three free ports."""
    servers = [socket.create_server(("", 0)) for _ in range(3)]
    numbers = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return numbers


@pytest.mark.slow
def test_ranks_meet_although_the_first_ports_are_taken_by_a_mute_stranger_and_by_another_run(ports):
    ours, theirs = Meeting(ports=ports, token="ours.1"), Meeting(ports=ports[1:], token="ours.2")
    stores = {}
    ranks = [threading.Thread(target=lambda r=r: stores.update({r: meet(ours, r, 3, 30)})) for r in (2, 1, 0)]
    with socket.create_server(("", ports[0])), announcing(theirs, 1, time.monotonic() + 5):
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(30)
    stores[0].set("word", "said")
    assert stores[1].get("word") == stores[2].get("word") == b"said"


def test_connections_that_are_reset_do_not_end_the_answers(ports):
    ours, closing = Meeting(ports=ports[:1], token="ours"), threading.Event()
    with socket.create_server(("", ports[0])) as server:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", ports[0])) as asker:
                asker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it resets it
        thread = threading.Thread(target=answer, args=(server, b"ours 4242\n", closing))
        thread.start()
        assert find(ours, time.monotonic() + 5) == 4242 and thread.is_alive()
        closing.set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert not thread.is_alive()


def test_a_connection_that_cannot_be_taken_does_not_end_the_answers():
    closing = threading.Event()

    class Server:
        said = []

        def accept(self):
            if not self.said:
                self.said.append("failed")
                raise OSError(24, "Too many open files")
            if closing.is_set():
                raise OSError(9, "Bad file descriptor")
            closing.set()
            ours, theirs = socket.socketpair()
            self.said.append(theirs)
            return ours, None

    server = Server()
    answer(server, b"ours 4242\n", closing)
    with server.said[1] as asker:
        assert asker.recv(100) == b"ours 4242\n"


def test_a_rank_that_finds_no_meeting_says_what_to_set(ports):
    with pytest.raises(TimeoutError, match=r"meeting ours at 127.0.0.1.*set MASTER_ADDR"):
        meet(Meeting(ports=ports, token="ours"), 1, 2, 0.3)


def test_the_port_is_free_again_after_the_meeting(ports):
    store = meet(Meeting(ports=ports[:1], token="ours"), 0, 1, 10)
    assert isinstance(store, torch.distributed.Store)
    socket.create_server(("", ports[0])).close()


def test_a_rank_without_a_gpu_among_others_is_named_at_once():
    store = torch.distributed.HashStore()
    for rank in (2, 0):
        check_alike(store, rank, "nccl")
    with pytest.raises(ValueError, match=r"rank 1 on .* would use gloo, rank 2 on .* nccl: .*--exclude"):
        check_alike(store, 1, "gloo")


def test_what_is_asked_of_slurm_is_read(monkeypatch):
    said = {"show": "JobId=7 JobState=RUNNING EndTime=1795876521 Comment=a=b Reason=None\n", "requeue": ""}
    asked = []
    monkeypatch.setattr(slurm, "command", lambda words: asked.append(words) or said[words[1]])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.end_time() == 1795876521.0
    assert slurm.requeue() and asked[-1] == ["scontrol", "requeue", "7"]
    said["show"] = "JobId=7 JobState=COMPLETING EndTime=Unknown"
    assert slurm.end_time() is None
    assert not slurm.requeue() and asked[-1][1] == "show", "a cancelled job stays cancelled"


def test_a_task_of_an_array_whose_number_is_that_of_the_array_is_asked_about_and_requeued_alone(monkeypatch):
    said = """JobId=8 ArrayJobId=7 ArrayTaskId=1 JobName=x JobState=RUNNING EndTime=100
JobId=7 ArrayJobId=7 ArrayTaskId=3 JobName=x JobState=RUNNING EndTime=200
JobId=9 ArrayJobId=7 ArrayTaskId=2 JobName=x JobState=COMPLETED EndTime=300
"""
    asked = []
    monkeypatch.setattr(slurm, "command", lambda words: asked.append(words) or said)
    for job, end, name in (("7", 200.0, "7_3"), ("8", 100.0, "7_1")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert slurm.end_time() == end
        assert slurm.requeue(hold=True) and asked[-1] == ["scontrol", "requeuehold", name]


def test_what_the_scheduler_says_may_be_in_any_encoding(monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_bytes(b"#!/bin/sh\necho 'JobId=7 JobName=\xfc JobState=RUNNING EndTime=5'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.end_time() == 5.0


def test_without_the_commands_of_slurm_the_end_is_what_the_batch_script_exported(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.end_time() is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795876521")
    assert slurm.end_time() == 1795876521.0
    assert not slurm.requeue()
