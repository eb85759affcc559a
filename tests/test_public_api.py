"""What `import lowrank_geo` offers; a name that comes or goes has to be changed here, too."""

import inspect
from importlib.metadata import version

import pytest

import lowrank_geo

PUBLIC = [
    "Backend",
    "FixedRank",
    "LowRankConv2d",
    "LowRankLinear",
    "Point",
    "Tangent",
    "__version__",
    "backend",
    "convert",
    "geometry",
    "load_pretrained",
    "lowrank_layers",
    "lowrank_linear",
    "optim",
    "param_groups",
    "plan_ranks",
    "retraction",
    "save_pretrained",
    "to_dense",
    "to_factors",
]


def test_the_public_names_are_these():
    assert lowrank_geo.__all__ == PUBLIC == sorted(PUBLIC)


def test_the_version_is_that_of_the_installed_package():
    assert lowrank_geo.__version__ == version("lowrank-geo")


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_every_public_name_is_there_and_says_what_it_is(name):
    assert inspect.getdoc(getattr(lowrank_geo, name))


def test_to_dense_at_the_top_is_that_of_models():
    assert lowrank_geo.to_dense.__module__ == "lowrank_geo.convert"
    assert lowrank_geo.geometry.to_dense is not lowrank_geo.to_dense


def test_an_unknown_name_raises_as_in_any_module():
    with pytest.raises(AttributeError, match="module 'lowrank_geo' has no attribute 'nothing'"):
        _ = lowrank_geo.nothing
