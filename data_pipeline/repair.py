"""Shards of a plan that are not what they should be, dropped so that `encode` makes them anew."""

from configs import storage
from data_pipeline.encode import load_encoder, place
from data_pipeline.plan import EncodeConfig, make_plans, require_same_plan
from data_pipeline.shards import index_url, read_index
from data_pipeline.units import Unit, list_units
from data_pipeline.verify import find_fault


def drop_faulty(config: EncodeConfig) -> list[str]:
    """Makes `encode_recordings` make anew what is altered, damaged or made without an episode that could not be
    decoded; a line for each such shard.

    Reads every shard; of several workers, each reads its part.
    """
    rank, world = place("RANK", 0), place("WORLD_SIZE", 1)
    encoder = load_encoder(config)
    dropped = []
    for plan in make_plans(config, encoder.codec):
        require_same_plan(plan, storage.join(config.out, plan.split))
        for unit in list_units(config, plan)[rank::world]:
            fault = _find_fault(unit)
            if fault:
                storage.remove(index_url(unit.url))
                dropped.append(f"{unit.url}: {fault}")
    return dropped


def _find_fault(unit: Unit) -> str | None:
    try:
        info, entries, left_out = read_index(unit.url)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if left_out:  # the recording may have been mended
        return f"made without {', '.join(left_out)}, tried again"
    if info.url != unit.name or len(entries) != unit.clips:
        return "its index is of another shard"
    return find_fault(unit.url, info, entries)
