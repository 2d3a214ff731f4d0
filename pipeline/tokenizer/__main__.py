from pipeline.stage import main
from pipeline.tokenizer.config import STAGE

if __name__ == "__main__":
    main(STAGE)
