from __future__ import annotations

import pytest

from api.errors import ApiError
from api.models.names import check_model_id, folder_name, model_id_of

GOOD = ["demo/shapes", "org/name-1.5_x", "single", "a/b"]
BAD = [
    "", "/", "a/", "/a", "../x", "a/../b", "a/..", "..", ".hidden", "a/.b", "a//b", "a/b/c", "a b/c", "a;rm/b",
    "$(id)/x", "a\nb/c", "a/b\n", "~root/x", "a\\b", "ä/b", "a--b/c", "x" * 201, "a/b?", "%2e%2e/x", "C:/x", "a/b-",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_names_map_to_folders_and_back(name: str) -> None:
    assert check_model_id(name, "f") == name
    assert "/" not in folder_name(name)
    assert model_id_of(folder_name(name)) == name


@pytest.mark.parametrize("name", BAD)
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ApiError) as error:
        check_model_id(name, "f")
    assert error.value.code == "INVALID_INPUTS"
