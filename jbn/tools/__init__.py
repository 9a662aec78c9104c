"""Tools for trained networks: pure functions on Linen variables and NNX models."""

from jbn.tools.adapt import adapt as adapt
from jbn.tools.convert import convert as convert, converting as converting
from jbn.tools.freeze import decays as decays, freeze as freeze, kinds as kinds
from jbn.tools.merge import average as average, fed_bn as fed_bn, merge as merge
from jbn.tools.recalibrate import population as population, recalibrate as recalibrate
