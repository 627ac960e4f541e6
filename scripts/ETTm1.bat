@echo off
rem Horizons 96, 192, 336 and 720 of ETTm1, or some: .\scripts\ETTm1.bat 96 192 --seed 1 (--help says more)
rem The LLM: --llm_model_path, else TIME_LLM_PATH (set TIME_LLM_PATH=D:\llm or $env:TIME_LLM_PATH = 'D:\llm')
python "%~dp0launch.py" ETTm1 %*
exit /b %errorlevel%
