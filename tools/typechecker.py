"""beartype as the tests use it: an int may stand for a float, as Python's own rules (PEP 484) say."""

from beartype import BeartypeConf
from beartype import beartype as plain

beartype = plain(conf=BeartypeConf(is_pep484_tower=True))
