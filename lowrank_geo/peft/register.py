"""How PEFT learns of a method that is not in its tree: a member of its enum of methods, then its own registration.

Measured alternatives (research of PEFT 0.21): a string key in PEFT's tables breaks Transformers' `load_adapter`, and
`_register_custom_module` saves adapters as LoRA whose third factor is lost on loading.
"""

from enum import EnumMeta
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = (
    "LOWRANK_GEO"  # what the KeyError of a process without this import shows: the package to import
)
PREFIX = "fixed_rank_"
TABLES = ("_member_map_", "_member_names_", "_value2member_map_")


def method_type() -> Any:
    """The member of `PeftType` for this method, inserted at the first call.

    Raises: ImportError if this version of Python or PEFT keeps its enum in another way.
    """
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    if not (isinstance(PeftType, EnumMeta) and all(hasattr(PeftType, table) for table in TABLES)):
        raise ImportError(
            f"lowrank_geo.peft needs PeftType to be an enum with {', '.join(TABLES)}, got {PeftType!r}; "
            "install another version of peft"
        )
    member: Any = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    return PeftType[NAME]


def register(config_class: type, model_class: type) -> None:
    """Make PEFT know the method; a second call changes nothing."""
    if method_type() in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(
        name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=PREFIX
    )
