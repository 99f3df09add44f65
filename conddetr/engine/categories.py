"""Which category of a data set each label of a model is."""

import itertools
import logging
from collections import Counter

log = logging.getLogger(__name__)


def category_ids_of(classes: list[dict], of_data: list[dict], by_name: bool = False) -> list[int]:
    """The data set's category id of every label of a model.

    Categories are the same where ids and names are. Where no id of the data set has another name in the model, names
    decide, as models of others number their classes otherwise; a line says so. Models that know no names, such as
    official checkpoints, go by ids; a line says so too.

    Args:
        classes, of_data: `id` and `name` of every label of the model, and of every category of the data set.
        by_name: names decide, whatever the ids.

    Raises:
        ValueError: an id has one name in the model and another in the data set; or the data set has a category that
            the model does not know, or two of one name where names decide.
    """
    own = [category["id"] for category in classes]
    named = {category["id"]: category["name"] for category in classes}
    unlike = [category for category in of_data if named.get(category["id"]) != category["name"]]
    if not unlike:
        return own
    first = unlike[0]
    if all(_is_nameless(category) for category in classes) and all(category["id"] in named for category in of_data):
        log.warning("The model's classes have no names: ids decide, id %s is %r.", first["id"], first["name"])
        return own
    clashing = [category for category in unlike if category["id"] in named]
    if clashing and not by_name:
        first = clashing[0]
        raise ValueError(
            f"Category id {first['id']} is {first['name']!r} in the data set and {named[first['id']]!r} in the model "
            f"({len(clashing)} such ids): use the annotations that it was trained on, or, where the same names mean "
            "the same classes, match them by name (--classes-by-name, by_name=True)."
        )
    return _ids_by_name(classes, of_data)


def _is_nameless(category: dict) -> bool:
    """Whether the name only repeats a number, as where a file of weights has none."""
    return category["name"] in (f"{category['id']}", f"LABEL_{category['id']}")


def _ids_by_name(classes: list[dict], of_data: list[dict]) -> list[int]:
    """As `category_ids_of`, by names alone; ids that the data set does not have for what it does not have."""
    names, ids = Counter(category["name"] for category in classes), {c["name"]: c["id"] for c in of_data}
    for category in of_data:
        if names[category["name"]] == 0:
            raise ValueError(
                f"The data set has a category that the model does not know, id {category['id']} "
                f"({category['name']!r}): evaluate on the classes it was trained on."
            )
        if names[category["name"]] > 1 or ids[category["name"]] != category["id"]:
            raise ValueError(
                f"Two categories have the name {category['name']!r}, and ids do not tell which is which: give both "
                "the data set and the model one name for each."
            )
    first = of_data[0]
    log.warning(
        "The data set numbers its classes otherwise than the model: they are matched by name, %r is id %s.",
        first["name"],
        first["id"],
    )
    unused = itertools.count(max([c["id"] for c in classes] + list(ids.values())) + 1)
    return [ids[category["name"]] if category["name"] in ids else next(unused) for category in classes]


def check_splits(train: list[dict], val: list[dict]) -> None:
    """Compare the categories of a training and a validation set.

    Raises:
        ValueError: an id has two names, or validation has a category that training does not have; names both.
    """
    named = {category["id"]: category["name"] for category in train}
    for category in val:
        own = named.get(category["id"])
        if own is None:
            raise ValueError(
                f"Category id {category['id']} ({category['name']!r}) is in the validation set and not in the training "
                "set: both need the same list of categories."
            )
        if own != category["name"]:
            raise ValueError(
                f"Category id {category['id']} is {own!r} in the training set and {category['name']!r} in the "
                "validation set: both need the same list of categories."
            )
