"""A model folder that cannot be used is refused with what is missing and what to do."""

from __future__ import annotations

import json

import pytest

from quartet.model_folder import METADATA_FILE, ModelFolderError, find_model, read_metadata, write_metadata


@pytest.fixture
def folder(tmp_path):
    """The least that looks like a model: find_model reads names, not weights."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_a_whole_folder_is_found_by_any_spelling_of_its_path(folder, monkeypatch):
    assert find_model(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert find_model(f"./{folder.name}").resolve() == folder
    assert find_model(folder.name).resolve() == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model(f"~/{folder.name}") == folder
    # A folder that looks like a hub id is taken for the folder.
    monkeypatch.chdir(folder.parent.parent)
    assert find_model(f"{folder.parent.name}/{folder.name}").resolve() == folder


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "the folder has no config.json, so it is not a Hugging Face model"),
        ("model.safetensors", r"no .safetensors weights; save it with save_pretrained\(folder\)"),
        ("tokenizer.json", r"the folder has no tokenizer \(none of tokenizer.json, .*tokenizer.save_pretrained"),
    ],
)
def test_what_is_missing_is_named_with_the_model(folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(ModelFolderError, match=message) as refused:
        find_model(str(folder))
    assert str(refused.value).startswith(f"model '{folder}': ")


def test_a_tokenizer_is_needed_only_where_it_is_asked_for(folder):
    (folder / "tokenizer.json").unlink()
    assert find_model(str(folder), need_tokenizer=False) == folder
    (folder / "vocab.txt").write_text("a")
    assert find_model(str(folder)) == folder


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nothing", "~/nothing", "nothing", "a/b/c", ""])
def test_a_path_without_a_folder_is_not_looked_for_on_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quartet.model_folder._download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelFolderError, match=r"there is no such folder|has no config.json"):
        find_model(name)


def test_a_hub_id_that_cannot_be_had_says_that_neither_folder_nor_hub_has_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelFolderError, match="model 'nobody/nothing': there is no such folder, and the hub gave: "):
        find_model("nobody/nothing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickled_weights_are_refused_with_the_way_out_and_never_opened(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"")
    with pytest.raises(ModelFolderError, match=rf"pickled \({name}\), and a pickle runs .* save_pretrained\(folder\)"):
        find_model(str(folder))


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a\\b"])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, shard):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": shard}}))
    with pytest.raises(ModelFolderError) as refused:
        find_model(str(folder))
    assert str(refused.value).endswith(
        f"model.safetensors.index.json names {shard!r}, which is not a file of the folder"
    )
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert find_model(str(folder)) == folder
    index.write_text("[]")
    with pytest.raises(ModelFolderError, match=r"model\.safetensors\.index\.json is no index of weights"):
        find_model(str(folder))


def test_names_and_revisions_that_are_paths_in_disguise_are_refused(folder, monkeypatch):
    monkeypatch.setattr("quartet.model_folder._download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelFolderError, match="a name has no NUL character"):
        find_model(f"{folder}\0.safe")
    for revision in ("../../../refs", "a/../b", "/etc", "", "a b", "~x"):
        with pytest.raises(ModelFolderError, match="must be a branch, tag or commit"):
            find_model("someone/model", revision=revision)
    for revision in ("main", "v1.0", "refs/pr/3", "0123abc"):
        assert find_model(str(folder), revision=revision) == folder


@pytest.mark.parametrize(("with_code", "wanted"), [(False, False), (True, True)])
def test_code_of_a_hub_model_is_fetched_only_when_asked_for(folder, monkeypatch, with_code, wanted):
    asked = {}

    def snapshot_download(model, *, revision, allow_patterns):
        asked["patterns"] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_model("someone/model", with_code=with_code) == folder
    assert ("*.py" in asked["patterns"]) is wanted
    assert not {"*.bin", "*.pt", "*"} & set(asked["patterns"])


def test_metadata_is_merged_and_kept_whole(folder):
    assert read_metadata(folder) == {}
    write_metadata(folder, kind="reward", append_eos=True)
    write_metadata(folder, append_eos=False, normalisation={"mean": 1.5, "std": 2.0, "count": 3})
    assert read_metadata(folder) == {
        "kind": "reward",
        "append_eos": False,
        "normalisation": {"mean": 1.5, "std": 2.0, "count": 3},
    }
    assert json.loads((folder / METADATA_FILE).read_text()) == read_metadata(folder)
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "quartet.json: not valid JSON"), ("[1]", "quartet.json: must hold a JSON object, is a list")],
)
def test_damaged_metadata_is_refused(folder, content, message):
    (folder / METADATA_FILE).write_text(content)
    with pytest.raises(ModelFolderError, match=message):
        read_metadata(folder)
