"""DiaBlo: fine-tune only the diagonal blocks of weight matrices (arXiv 2506.03230), as a PEFT tuner.

    from diablo import DiabloConfig
    from peft import get_peft_model

    model = get_peft_model(base, DiabloConfig(num_blocks=64, target_modules=["q_proj", "v_proj"]))

Importing this package makes PEFT know the methods; import it before loading a saved adapter.
"""

from diablo.bottleneck import BottleneckConfig, BottleneckModel
from diablo.config import DiabloConfig
from diablo.in_place import refresh
from diablo.layer import DiabloLayer
from diablo.linear import DiabloLinear
from diablo.lori import LoriConfig, LoriModel
from diablo.milora import MiloraConfig, MiloraModel
from diablo.model import DiabloModel
from diablo.s2ft import S2ftConfig, S2ftModel
from diablo.smt import SmtConfig, SmtModel
from diablo.sparse import SparseConfig, SparseModel
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
    "refresh",
    "suggest_num_blocks",
]
