"""The manifest: what is written is read, what was damaged or made up is a FormatError and nothing else."""

import dataclasses
import json

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather_ckpt import hashtree, manifest, paths
from forgather_ckpt.errors import FormatError, UnsupportedVersion
from forgather_ckpt.manifest import (
    NOT_COMPARED,
    CheckpointManifest,
    ComponentRecord,
    EntryRecord,
    FileRecord,
    Validation,
)
from forgather_ckpt.patterns import SharingPattern, ValidationLevel
from forgather_ckpt.topology import Group, Topology
from tests.golden_files import golden
from tests.json_mutations import mutated


def hex_digest(text: str) -> str:
    return hashtree.digest(text.encode()).hex()


def sample() -> CheckpointManifest:
    """A manifest with something in every field."""
    return CheckpointManifest(
        step=1000,
        sequence=7,
        kind="periodic",
        created="2024-01-02T03:04:05+00:00",
        topology=Topology(
            rank=0,
            world_size=4,
            nodes=((0, 1), (2, 3)),
            node_source="torchrun group rank",
            groups={
                "dp": Group(((0, 2), (1, 3)), ((("pp", 0, 2),), (("pp", 1, 2),))),
                "bare": Group(((0, 1, 2, 3),)),
            },
        ),
        components={
            "model": ComponentRecord(
                pattern=SharingPattern.REPLICATED,
                names="global",
                required=True,
                group=None,
                entries={
                    "all": EntryRecord(
                        ranks=(0, 1, 2, 3),
                        coordinates=None,
                        writers=(0, 1),
                        num_items=3,
                        num_bytes=48,
                        digest=hex_digest("model"),
                        validation=Validation(ValidationLevel.TENSOR, "differed", 2, 0.25),
                        trusted=(0, 1, 3),
                        excluded=("norm.running_mean",),
                    )
                },
                digest=hex_digest("model"),
                metadata={"note": "αβ", "nested": {"list": [1, None]}},
            ),
            "stage": ComponentRecord(
                pattern=SharingPattern.PER_GROUP,
                names="local",
                required=False,
                group="dp",
                entries={
                    "pp=0/2": EntryRecord((0, 2), (("pp", 0, 2),), (0,), 1, 8, hex_digest("a")),
                    "pp=1/2": EntryRecord((1, 3), (("pp", 1, 2),), (1,), 1, 8, hex_digest("b")),
                },
                digest=hex_digest("stage"),
            ),
        },
        files={
            "model-00000-of-00004.safetensors": FileRecord(4144, hex_digest("file"), 0),
            "index-00000.json": FileRecord(500, hex_digest("index"), 0),
            "index-00001.json": FileRecord(300, hex_digest("other index"), 1),
        },
        indexes={
            "index-00000.json": [("model", "all"), ("stage", "pp=0/2")],
            "index-00001.json": [("stage", "pp=1/2")],
        },
        epoch=1.5,
        run_id="0123abcd",
        parent={"step": 500, "sequence": 6, "digest": hex_digest("parent")},
        omitted={"callbacks": "on ranks 2: state_dict() raised"},
        metrics={"loss": 2.5, "worst": {"$float": "inf"}},
        training_args={"learning_rate": 0.001, "hub_token": "(redacted)"},
        environment={"torch": "2.10"},
        timings={"write": [0.5, 0.25, 0.5, 0.5]},
    )


DATA = sample().to_bytes()


def sealed(content: dict) -> bytes:
    """The bytes of a manifest with this content and the digest that belongs to it, as a forger would make them."""
    content = {"format": content.get("format"), "version": content.get("version"), **content, "digest": "0" * 32}
    blank = json.dumps(content).encode()
    return blank.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(blank).encode(), 1)


def test_the_format_is_what_it_was():
    assert golden("checkpoint_manifest.json", DATA) == DATA


def test_what_is_written_is_read():
    found = CheckpointManifest.from_bytes(DATA)
    assert found == dataclasses.replace(sample(), digest=found.digest)
    assert found.to_bytes() == DATA


def test_sums_and_writers_come_from_the_entries():
    found = CheckpointManifest.from_bytes(DATA)
    assert (found.world_size, found.num_bytes) == (4, 4944)
    assert [(one.num_items, one.num_bytes, one.writers) for one in found.components.values()] == [
        (3, 48, (0, 1)),
        (2, 16, (0, 1)),
    ]


def test_a_checkpoint_of_the_first_version_does_not_tell_what_was_compared_of_an_entry():
    content = json.loads(DATA)
    for record in content["components"].values():
        for entry in record["entries"].values():
            del entry["validation"]
    model = CheckpointManifest.from_bytes(sealed(content)).components["model"]
    assert (model.validation, model.trusted, model.excluded) == (NOT_COMPARED, {}, {})


def test_a_component_was_checked_as_strictly_and_differed_as_badly_as_any_of_its_entries():
    def component(*validations: Validation) -> Validation:
        stage = sample().components["stage"]
        first = stage.entries["pp=0/2"]
        entries = {str(n): dataclasses.replace(first, validation=one) for n, one in enumerate(validations)}
        return dataclasses.replace(stage, entries=entries).validation

    quick = Validation(ValidationLevel.QUICK, "equal", 3, 0.5)
    full = Validation(ValidationLevel.FULL, "differed", 4, 0.25)
    assert component() == component(NOT_COMPARED, NOT_COMPARED) == NOT_COMPARED
    assert component(NOT_COMPARED, quick) == component(quick, NOT_COMPARED) == quick
    assert component(quick, full) == component(full, quick) == Validation(ValidationLevel.FULL, "differed", 7, 0.5)


def test_its_digest_is_that_of_its_own_bytes_with_the_digest_zeroed():
    own = json.loads(DATA)["digest"]
    assert DATA.count(own.encode()) == 1
    assert own == xxhash.xxh3_128_hexdigest(DATA.replace(own.encode(), b"0" * 32))
    assert CheckpointManifest.from_bytes(DATA).digest == own


def test_every_single_bit_flip_is_refused():
    for position in range(len(DATA)):
        for bit in range(8):
            damaged = bytearray(DATA)
            damaged[position] ^= 1 << bit
            with pytest.raises(FormatError):
                CheckpointManifest.from_bytes(bytes(damaged))


def test_every_truncation_is_refused():
    for length in range(len(DATA)):
        with pytest.raises(FormatError):
            CheckpointManifest.from_bytes(DATA[:length])


@given(st.data())
def test_bytes_moved_about_are_refused(data):
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(DATA)), st.integers(0, len(DATA)))))
    damaged = DATA[:start] + data.draw(st.binary(max_size=40)) + DATA[stop:]
    if damaged != DATA:
        with pytest.raises(FormatError):
            CheckpointManifest.from_bytes(damaged)


@settings(max_examples=250)
@given(st.data())
def test_any_content_under_a_right_digest_is_a_manifest_or_a_format_error(data):
    forged = sealed(mutated(data, json.loads(DATA)))
    try:
        found = CheckpointManifest.from_bytes(forged)
    except FormatError:
        return
    assert all(paths.is_safe_file_name(name) for name in found.files)
    assert set(found.indexes) <= set(found.files)
    entries = [entry for component in found.components.values() for entry in component.entries.values()]
    assert all(rank < found.world_size for entry in entries for rank in entry.ranks)
    assert isinstance(found.num_bytes, int)


def changed(*path: str, to: object) -> bytes:
    content = json.loads(DATA)
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    return sealed(content)


def test_a_forged_digest_would_be_believed():
    assert CheckpointManifest.from_bytes(changed("step", to=1001)).step == 1001


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "the manifest is not valid"),
        (b"[]", "the manifest is a list; expected an object"),
        (b"{}", "has no field 'format'"),
        (changed("format", to="zip"), "is of format 'zip'; expected 'forgather_ckpt'"),
        (changed("step", to=-1), "field 'step' is -1; expected a count"),
        (changed("step", to=1.0), "field 'step' is a float; expected int"),
        (changed("step", to=True), "field 'step' is True"),
        (changed("world_size", to="4"), "field 'world_size' is a str"),
        (changed("nodes", to=5), "malformed"),
        (changed("groups", to=[]), "malformed"),
        (changed("groups", "dp", to=[]), "malformed"),
        (
            changed("files", "../evil", to={"size": 1, "digest": "0" * 32, "writer": 0}),
            "which is not a plain file name",
        ),
        (
            changed("files", ".hidden", to={"size": 1, "digest": "0" * 32, "writer": 0}),
            "which is not a plain file name",
        ),
        (changed("files", "a/b", to={"size": 1, "digest": "0" * 32, "writer": 0}), "which is not a plain file name"),
        (changed("files", "index-00000.json", "size", to=-5), "file 'index-00000.json': field 'size'"),
        (changed("files", "index-00000.json", "digest", to="xyz"), "expected 32 hex digits"),
        (changed("indexes", "index-00009.json", to=[]), r"index files ['index-00009.json'] are not among its files"),
        (changed("indexes", "index-00000.json", to=[["model", "pp=9"]]), "hold entries of no component"),
        (changed("indexes", "index-00000.json", to=[[{}, []]]), "malformed"),
        (changed("indexes", "index-00000.json", to=5), "malformed"),
        (changed("components", "model", "pattern", to="sharded"), "malformed"),
        (changed("components", "model", "entries", "all", "validation", to=None), "field 'validation' is"),
        (changed("components", "model", "entries", "all", "validation", "level", to="deep"), "malformed"),
        (changed("components", "model", "entries", "all", "validation", "seconds", to=10**400), "malformed"),
        (changed("components", "model", "entries", "all", "validation", "trusted", to=3), "field 'trusted' is a int"),
        (changed("components", "model", "entries", "all", "validation", "excluded", to=[3]), "holds a int"),
        (changed("components", "model", "entries", "all", "ranks", to=[0, 4]), "names ranks (0, 4) of a job of 4"),
        (changed("components", "model", "entries", "all", "coordinates", to=[["pp", 0]]), "malformed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused(data, problem):
    with pytest.raises(FormatError) as caught:
        CheckpointManifest.from_bytes(data)
    assert problem in caught.value.message
    assert not isinstance(caught.value, UnsupportedVersion)


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "", "one"])
def test_another_major_version_is_told_apart_from_damage(version):
    with pytest.raises(UnsupportedVersion, match="Update the package"):
        CheckpointManifest.from_bytes(changed("version", to=version))


def test_digests_of_another_algorithm_are_told_apart_from_damage():
    with pytest.raises(UnsupportedVersion, match="'blake3'"):
        CheckpointManifest.from_bytes(changed("algorithm", to="blake3"))


def test_a_newer_minor_version_may_have_more_fields():
    content = json.loads(DATA) | {"version": "1.9", "new": {"field": 1}}
    content["components"]["model"]["new"] = True
    assert CheckpointManifest.from_bytes(sealed(content)).step == 1000


def test_it_is_loaded_from_a_directory_or_by_its_file(tmp_path):
    (tmp_path / paths.MANIFEST).write_bytes(DATA)
    expected = CheckpointManifest.from_bytes(DATA)
    for path in (tmp_path, str(tmp_path), tmp_path / paths.MANIFEST):
        assert CheckpointManifest.load(path) == expected


def test_errors_of_a_file_name_it(tmp_path):
    with pytest.raises(FormatError, match="cannot read the manifest") as caught:
        CheckpointManifest.load(tmp_path / "nothing here")
    assert caught.value.path == str(tmp_path / "nothing here")
    (tmp_path / paths.MANIFEST).write_bytes(DATA[:-1])
    with pytest.raises(FormatError) as caught:
        CheckpointManifest.load(tmp_path)
    assert caught.value.path == str(tmp_path / paths.MANIFEST)


def test_an_endless_file_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 1000)
    with (tmp_path / paths.MANIFEST).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match="is 1001 bytes long; at most 1000 are read"):
        CheckpointManifest.load(tmp_path)
