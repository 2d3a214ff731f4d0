from pipeline.export.config import STAGE
from pipeline.stage import main

if __name__ == "__main__":
    main(STAGE)
