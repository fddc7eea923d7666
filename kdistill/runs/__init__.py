"""The story of a run, of a sweep, and of the compressions in a run; start with `run`.

Each step is done by the room that owns it; here is their order, the run folder, and the assembled result.
"""
