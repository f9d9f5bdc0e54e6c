"""The ideas that make small models good, each an option of the one trainer with a small study: `nearfar study NAME`."""

STUDIES: dict[str, str] = {  # name -> the module whose STUDY it is (study.py says how to write one)
    "wsd": "nearfar_cloud.training.studies.wsd",
    "capacity": "nearfar_cloud.training.studies.capacity",
    "sft": "nearfar_cloud.training.studies.sft",
    "halo": "nearfar_cloud.training.studies.halo",
}
