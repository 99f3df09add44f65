"""Matching a model's labels with the categories of a data set."""

import itertools
import logging
from collections import Counter

log = logging.getLogger(__name__)


def category_ids_of(classes: list[dict], categories: list[dict], by_name: bool = False) -> list[int]:
    """The data set's category id of every label of a model.

    Categories match if ids and names are the same. If ids differ, but no id has two names, categories are matched by
    name, because other repositories number classes differently; a warning says so. Models without class names, such as
    official checkpoints, are matched by id, also with a warning.

    Args:
        classes, categories: `id` and `name` of every label of the model, and of every category of the data set.
        by_name: match by name and ignore ids.

    Raises:
        ValueError: an id has one name in the model and another in the data set; or the data set has a category that
            the model lacks; or two categories have the same name when names are matched.
    """
    ids = [category["id"] for category in classes]
    names_by_id = {category["id"]: category["name"] for category in classes}
    differing = [category for category in categories if names_by_id.get(category["id"]) != category["name"]]
    if not differing:
        return ids
    first = differing[0]
    if all(_is_nameless(category) for category in classes) and all(
        category["id"] in names_by_id for category in categories
    ):
        log.warning(
            "The model's classes have no names: they are matched by id, id %s is %r.", first["id"], first["name"]
        )
        return ids
    clashing = [category for category in differing if category["id"] in names_by_id]
    if clashing and not by_name:
        first = clashing[0]
        raise ValueError(
            f"Category id {first['id']} is {first['name']!r} in the data set and {names_by_id[first['id']]!r} in the "
            f"model ({len(clashing)} such ids): use the annotations that the model was trained on, or, if the same "
            "names mean the same classes, match them by name (--classes-by-name, by_name=True)."
        )
    return _ids_by_name(classes, categories)


def _is_nameless(category: dict) -> bool:
    """Whether the name only repeats the id, as in weight files without class names."""
    return category["name"] in (f"{category['id']}", f"LABEL_{category['id']}")


def _ids_by_name(classes: list[dict], categories: list[dict]) -> list[int]:
    """As `category_ids_of`, by names alone; labels that the data set lacks get unused ids."""
    names, ids = Counter(category["name"] for category in classes), {c["name"]: c["id"] for c in categories}
    for category in categories:
        if names[category["name"]] == 0:
            raise ValueError(
                f"The data set has a category that the model lacks, id {category['id']} ({category['name']!r}): "
                "evaluate on the classes that the model was trained on."
            )
        if names[category["name"]] > 1 or ids[category["name"]] != category["id"]:
            raise ValueError(
                f"Two categories have the name {category['name']!r}, and their ids do not distinguish them: use "
                "unique names in the data set and in the model."
            )
    first = categories[0]
    log.warning(
        "The data set and the model number their classes differently: they are matched by name, %r is id %s.",
        first["name"],
        first["id"],
    )
    unused = itertools.count(max([c["id"] for c in classes] + list(ids.values())) + 1)
    return [ids[category["name"]] if category["name"] in ids else next(unused) for category in classes]


def check_splits(train: list[dict], val: list[dict]) -> None:
    """Compare the categories of a training and a validation set.

    Raises:
        ValueError: an id has two names, or validation has a category that training lacks; the message names both.
    """
    names_by_id = {category["id"]: category["name"] for category in train}
    for category in val:
        name = names_by_id.get(category["id"])
        if name is None:
            raise ValueError(
                f"Category id {category['id']} ({category['name']!r}) is in the validation set and not in the training "
                "set: both need the same list of categories."
            )
        if name != category["name"]:
            raise ValueError(
                f"Category id {category['id']} is {name!r} in the training set and {category['name']!r} in the "
                "validation set: both need the same list of categories."
            )
