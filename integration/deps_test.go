package integration

import (
	_ "github.com/chromedp/chromedp"
	_ "github.com/prometheus/common/expfmt"
)
