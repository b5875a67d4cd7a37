"""``python -m lab.charts``: draw the charts from the records."""

import sys

from lab.charts import main

sys.exit(main())
