"""Write the image towers of make_peer_weights_towers.py with this program, each in every format that has it, for
`make_peer_weights_towers.py --check FOLDER` to load.

In this project's environment and the repository's root: PYTHONPATH=.:tests python tests/reference/write_towers.py DIR
"""

import sys
from pathlib import Path

from helpers.weight_files import TOWERS, patch_grid, read_with_model

from vit_static.common.errors import WeightsError
from vit_static.config.schema import InitConfig
from vit_static.weights.convert import convert_state, write_converted

folder = Path(sys.argv[1])
for name in TOWERS:
    external, config = read_with_model(name)
    state = convert_state(external, config, name, InitConfig(head="keep"), patch_grid(config))[0]
    for to in ("timm", "huggingface", "openclip"):
        target = folder / f"{name}@{to}" / "model.safetensors"
        target.parent.mkdir(parents=True)
        try:
            write_converted(state, config, target, to)
        except WeightsError as error:
            target.parent.rmdir()
            print(f"{name}: {error}")
