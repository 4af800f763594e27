"""What the embedding stage asks a cluster for, what it moves through it, and what a loss costs."""

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import TINY_TOWERS
from PIL import Image
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.cluster_utils import Cluster
from ray.data import DataContext

from jobs import embed, embed_actors
from jobs.cluster import HEAD_ENVIRONMENT, WORKER_ENVIRONMENT, connect, ray_session
from jobs.config import EmbedConfig, JobConfig, RayConfig
from jobs.diff import compare_with_store, read_retry
from jobs.duplicates import image_vectors
from jobs.embed import embed_rows
from jobs.embed_actors import (
    SIDE_SLOTS,
    Actors,
    actor_share,
    piece_rows,
    plan_actors,
    watched,
)
from jobs.embed_steps import EmbedTask
from jobs.errors import ConfigError
from jobs.inputs import add_encoder, open_catalog
from jobs.machines import without_cut_off
from jobs.nodes import on_workers
from jobs.store import Store

MB = 10**6
PIXELS = 224 * 224 * 3


@pytest.fixture(scope="module")
def large_towers(tmp_path_factory):
    """Tiny towers that take pictures of the usual size."""
    towers = TINY_TOWERS | {
        "vision_cfg": TINY_TOWERS["vision_cfg"] | {"image_size": 224, "patch_size": 112}
    }
    path = tmp_path_factory.mktemp("towers") / "large.json"
    path.write_text(json.dumps(towers))
    return path


def write_photos(path, count):
    """A catalog of distinct pictures of 32 px, their bytes in the table."""
    random = np.random.default_rng(0)
    photos = []
    for _ in range(count):
        buffer = io.BytesIO()
        coarse = Image.fromarray(random.integers(0, 255, (4, 4, 3), np.uint8))
        coarse.resize((32, 32), Image.Resampling.NEAREST).save(buffer, "JPEG")
        photos.append(buffer.getvalue())
    columns = {"product_id": [f"p{n}" for n in range(count)], "image": photos}
    pq.write_table(pa.table(columns), path, row_group_size=2000)


@dataclass
class Traffic:
    """What Ray counted of its object stores, bytes; `used` is the most at any moment."""

    created: int = 0
    used: int = 0
    spilled: int = 0


@contextmanager
def measured_traffic():
    """Sample Ray's own figures until the end of the block."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    traffic, over = Traffic(), threading.Event()

    def sample():
        while not over.wait(0.1):
            read()

    def read():
        stats = get_memory_info_reply(state).store_stats
        traffic.used = max(traffic.used, stats.object_store_bytes_used)
        traffic.spilled, traffic.created = stats.spilled_bytes_total, stats.cumulative_created_bytes

    read()
    before = traffic.created
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield traffic
    finally:
        over.set()
        thread.join()
        read()
        traffic.created -= before


def make_stage(root, towers, catalog, **embed):
    """The task and the diff of a first embedding."""
    config = JobConfig.model_validate(
        {
            "store": str(root),
            "catalog": {"path": str(catalog), "columns": {"image_bytes": "image"}},
            "encoder": {"architecture": str(towers), "pretrained": "random"},
            "embed": {"fields": ["image"], **embed},
        }
    )
    store = Store(config.store)
    space, _ = add_encoder(config, store)
    opened = open_catalog(config.catalog, config.embed.fields)
    diff = compare_with_store(
        opened,
        store,
        space.encoder,
        space.recipe,
        images=config.images,
        bucket_rows=config.ray.bucket_rows,
        parent=None,
        retry=read_retry(config, None),
    )
    task = EmbedTask(
        catalog=opened,
        images=config.images,
        embed=config.embed,
        store=store,
        space=space,
        generation=diff.counts.generation + 1,
    )
    return task, diff


def committed_rows(store):
    """Ids of the rows that commits name."""
    table = store.embeddings()
    files = [f"{store.root}/embeddings/{one}" for one in store.embedding_files(table.version())]
    return np.concatenate([pq.read_table(f, columns=["vector_id"])["vector_id"] for f in files])


@pytest.fixture
def no_ray(monkeypatch):
    """Without the Ray of the other modules, which is there again afterwards."""
    for name, value in HEAD_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    shared = ray.is_initialized()
    ray.shutdown()
    yield
    ray.shutdown()
    if shared:
        connect(RayConfig(object_store_mb=128))


@contextmanager
def ray_with_gpu(store_bytes):
    """A Ray of this machine that counts a GPU: the pipeline's form is that of one."""
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    environment = {"env_vars": WORKER_ENVIRONMENT}
    ray.init(
        address="local",  # never another one that runs on this machine
        num_cpus=2,
        num_gpus=1,
        object_store_memory=store_bytes,
        runtime_env=environment,
        **options,
    )
    yield
    ray.shutdown()


@contextmanager
def small_cluster():
    """A head that takes no work and a worker of two CPUs; what others are to be started with."""
    room = {"object_store_memory": 100 * MB}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **room}
    )
    cluster.add_node(num_cpus=2, **room)
    try:
        with ray_session(RayConfig(address=cluster.address)):
            yield cluster, room
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize(
    ("store_mb", "photos"), [(100, 2000), pytest.param(200, 34_000, marks=pytest.mark.slow)]
)
def test_pixels_stay_below_the_stores_limit(no_ray, large_towers, tmp_path, store_mb, photos):
    """5 GB of them through 200 MB; and what takes less time."""
    write_photos(tmp_path / "catalog.parquet", photos)
    with ray_with_gpu(store_mb * MB):
        task, diff = make_stage(tmp_path / "store", large_towers, tmp_path / "catalog.parquet")
        with measured_traffic() as traffic:
            result = embed_rows(task, diff, lambda done, rejected: None)
    assert (result.embedded, result.images_embedded) == (photos, photos)
    assert len(set(committed_rows(task.store).tolist())) == photos
    assert traffic.created >= photos * PIXELS
    assert traffic.spilled == 0
    assert traffic.used <= store_mb * MB


def test_no_pixel_crosses_the_store_on_cpus(no_ray, large_towers, tmp_path):
    write_photos(tmp_path / "catalog.parquet", 500)
    with ray_session(RayConfig(object_store_mb=100)):
        task, diff = make_stage(tmp_path / "store", large_towers, tmp_path / "catalog.parquet")
        with measured_traffic() as traffic:
            embed_rows(task, diff, lambda done, rejected: None)
        with pytest.raises(ConfigError, match=r"actor asks for 0\.5 GPU .* have 0 GPU"):
            plan_actors(EmbedConfig(gpus_per_actor=0.5))
        with pytest.raises(ConfigError, match="99,000,000 MiB of memory"):
            plan_actors(EmbedConfig(memory_mb_per_actor=99_000_000))
    assert len(committed_rows(task.store)) == 500
    assert traffic.created < 500 * PIXELS / 20


def test_shared_vectors_do_not_lie_on_a_head_that_takes_no_work(no_ray):
    def find_node(actor):
        return ray.get_runtime_context().get_node_id()

    with small_cluster() as (cluster, _), image_vectors(10, 4) as vectors:
        found = ray.get(vectors.__ray_call__.remote(find_node))
        assert found != cluster.head_node.node_id
        # By chance alone it would often be there, too.
        assert on_workers() == {"ray.io/node-id": f"!in({cluster.head_node.node_id})"}


def test_files_and_what_a_kill_costs_stay_small_where_pieces_are_large(
    no_ray, large_towers, tmp_path, monkeypatch
):
    """As with more rows than pieces of some hundreds are handed out."""
    monkeypatch.setattr(embed, "MAX_PIECES", 2)
    write_photos(tmp_path / "catalog.parquet", 300)
    told = []
    # Whoever else uses Ray Data in this process keeps its own settings.
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 12_345_678)
    with ray_session(RayConfig(object_store_mb=100)):
        catalog = tmp_path / "catalog.parquet"
        task, diff = make_stage(
            tmp_path / "store", large_towers, catalog, rows_per_file=64, commit_interval_s=1e-3
        )
        embed_rows(task, diff, lambda done, rejected: told.append(done))
    assert len(committed_rows(task.store)) == 300
    files = (tmp_path / "store" / "embeddings").glob("*.parquet")
    sizes = sorted(pq.ParquetFile(file).metadata.num_rows for file in files)
    assert sizes == [22, 42, 44, 64, 64, 64]  # pieces of 150 and 106 rows of a unit, 44 of another
    assert np.diff([0, *told]).max() == 64  # each is known to the driver as soon as it is there
    assert DataContext.get_current().target_max_block_size == 12_345_678


def test_stage_waits_for_a_gpu_and_says_so(no_ray, large_towers, tmp_path, caplog):
    write_photos(tmp_path / "catalog.parquet", 100)
    with small_cluster() as (cluster, room), ThreadPoolExecutor(1) as pool:
        catalog = tmp_path / "catalog.parquet"
        task, diff = make_stage(tmp_path / "store", large_towers, catalog, gpus_per_actor=1)
        run = pool.submit(embed_rows, task, diff, lambda done, rejected: None)
        deadline = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not run.done()
        cluster.add_node(num_cpus=1, num_gpus=1, **room)
        assert run.result(timeout=120).embedded == 100
    (line,) = caplog.messages
    assert "embedding waits for a machine with 1 GPU " in line
    assert "have 0 GPU, 2 CPU" in line


@pytest.mark.slow
def test_lost_node_costs_what_it_had_in_flight(no_ray, large_towers, tmp_path):
    photos, piece, done = 3000, 64, []
    write_photos(tmp_path / "catalog.parquet", photos)
    with small_cluster() as (cluster, room), ThreadPoolExecutor(1) as pool:
        lost = cluster.add_node(num_cpus=2, **room)
        catalog = tmp_path / "catalog.parquet"
        task, diff = make_stage(tmp_path / "store", large_towers, catalog, rows_per_file=piece)
        run = pool.submit(embed_rows, task, diff, lambda rows, rejected: done.append(rows))
        deadline = time.monotonic() + 60
        while (not done or done[-1] < photos / 4) and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(lost, allow_graceful=False)
        result = run.result(timeout=180)
    assert result.embedded == photos
    assert len(set(committed_rows(task.store).tolist())) == photos
    folder = tmp_path / "store" / "embeddings"
    written = sum(pq.ParquetFile(file).metadata.num_rows for file in folder.glob("*.parquet"))
    assert written - photos <= 4 * piece  # files whose names were lost with the node


def test_lost_actor_without_room_is_given_up_where_nothing_moves(no_ray, monkeypatch, caplog):
    monkeypatch.setattr(embed_actors, "ROOM_PATIENCE_S", 0.5)
    monkeypatch.setattr(embed_actors, "STALL_S", 3.0)

    @ray.remote(num_cpus=0, num_gpus=1, max_restarts=-1, max_task_retries=-1)
    class Waiter:
        def node(self):
            return ray.get_runtime_context().get_node_id()

        def wait(self):
            time.sleep(600)

    with small_cluster() as (cluster, room):
        nodes = [cluster.add_node(num_cpus=1, num_gpus=1, **room) for _ in range(2)]
        waiters = [Waiter.remote() for _ in nodes]
        places = ray.get([waiter.node.remote() for waiter in waiters])
        lost = waiters[places.index(nodes[0].node_id)]
        with watched(Actors(gpus=1, cpus=0, memory_mb=0), "Waiter"):
            never = lost.wait.remote()
            cluster.remove_node(nodes[0], allow_graceful=False)
            with pytest.raises(ray.exceptions.ActorDiedError):
                ray.get(never, timeout=90)
        left = waiters[places.index(nodes[1].node_id)]
        assert ray.get(left.node.remote(), timeout=30) == nodes[1].node_id
    (line,) = caplog.messages
    assert "1 embedding actors were lost and find no room" in line


@pytest.mark.slow
def test_lost_gpu_that_nobody_replaces_does_not_stall_the_rest(
    no_ray, large_towers, tmp_path, monkeypatch
):
    """What waits for the lost one can fill so small an object store."""
    photos, done, begun = 3000, [], []
    monkeypatch.setattr(embed_actors, "STALL_S", 15.0)
    write_photos(tmp_path / "catalog.parquet", photos)
    with small_cluster() as (cluster, room), ThreadPoolExecutor(1) as pool:
        workers = [cluster.add_node(num_cpus=1, num_gpus=1, **room) for _ in range(2)]

        def work():
            catalog = tmp_path / "catalog.parquet"
            task, diff = make_stage(
                tmp_path / "store", large_towers, catalog, rows_per_file=64, commit_interval_s=1
            )
            embed_rows(task, diff, lambda rows, rejected: done.append(rows))
            return task.store

        run = pool.submit(without_cut_off, work, [], begun.append)
        deadline = time.monotonic() + 60
        while (not done or done[-1] < photos / 4) and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(workers[0], allow_graceful=False)
        store = run.result(timeout=180)
    assert len(set(committed_rows(store).tolist())) == photos
    assert len(begun) <= 1


@pytest.mark.parametrize(
    ("rows", "count", "wanted"),
    [
        (20, 16, [16, 4]),
        (60, 2, [16, 16, 16, 12]),
        (300, 2, [75, 57, 42, 32, 24, 18, 16, 16, 16, 4]),
        (1_000, 1, [256, 256, 244, 122, 61, 31, 16, 14]),
    ],
)
def test_pieces_get_smaller_so_that_all_actors_end_together(rows, count, wanted):
    actors, pieces = Actors(gpus=0, cpus=1, memory_mb=0, count=count), []
    while rows:
        pieces.append(min(rows, piece_rows(EmbedConfig(), actors, rows)))
        rows -= pieces[-1]
    assert pieces == wanted


def test_actor_asks_for_what_is_configured():
    assert Actors(gpus=0.5, cpus=0, memory_mb=2).options == {"num_gpus": 0.5, "memory": 2 * 2**20}
    assert Actors(gpus=0, cpus=4, memory_mb=0, share=0.75).options == {"num_cpus": 3.0}
    with pytest.raises(ValueError, match="less than or equal to 1"):
        EmbedConfig(gpus_per_actor=2)


@pytest.mark.parametrize("cpus", [1, 2, 3, 7, 64, 192])
def test_actors_leave_room_for_a_task_beside_them_and_not_for_another_actor(cpus):
    taken = cpus * round(10_000 * actor_share(cpus)) / 10_000  # as Ray counts
    assert SIDE_SLOTS <= cpus - taken < actor_share(cpus)
