"""DiaBlo: fine-tune only the diagonal blocks of weight matrices (arXiv 2506.03230), as a PEFT tuner.

    from diablo import DiabloConfig
    from peft import get_peft_model

    model = get_peft_model(base, DiabloConfig(num_blocks=64, target_modules=["q_proj", "v_proj"]))

Importing this package registers the methods with PEFT; import it before you load a saved adapter.
"""

import sys
from itertools import pairwise

# While Python locates `diablo.convert` for `python -m diablo.convert`, it imports this package and argv[0] is "-m". The
# command then parses its arguments before it imports torch, so that --help is immediate.
_is_command = sys.argv[:1] == ["-m"] and any(
    option == "-m" and module.startswith("diablo.") for option, module in pairwise(sys.orig_argv)
)
if not _is_command:
    from diablo.blocks.config import DiabloConfig
    from diablo.blocks.in_place import refresh
    from diablo.blocks.layer import DiabloLayer
    from diablo.blocks.linear import DiabloLinear
    from diablo.blocks.model import DiabloModel

    # Configs name these functions in `method.prepare`, e.g. diablo.smt.choose_blocks.
    from diablo.methods import lora_ga, lori, smt
    from diablo.methods.bottleneck import BottleneckConfig, BottleneckModel
    from diablo.methods.lori import LoriConfig, LoriModel
    from diablo.methods.milora import MiloraConfig, MiloraModel
    from diablo.methods.s2ft import S2ftConfig, S2ftModel
    from diablo.methods.smt import SmtConfig, SmtModel
    from diablo.methods.sparse import SparseConfig, SparseModel
    from diablo.suggest import suggest_num_blocks

__all__ = [
    "BottleneckConfig",
    "BottleneckModel",
    "DiabloConfig",
    "DiabloLayer",
    "DiabloLinear",
    "DiabloModel",
    "LoriConfig",
    "LoriModel",
    "MiloraConfig",
    "MiloraModel",
    "S2ftConfig",
    "S2ftModel",
    "SmtConfig",
    "SmtModel",
    "SparseConfig",
    "SparseModel",
    "lora_ga",
    "lori",
    "refresh",
    "smt",
    "suggest_num_blocks",
]
