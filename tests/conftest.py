import sys
from pathlib import Path

# `from tolerances import assert_close` in any folder; appended, so that nothing installed is shadowed.
sys.path.append(str(Path(__file__).parent))
