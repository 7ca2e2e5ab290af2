package chaos

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// A proxy is a TCP proxy that can be told to be faulty.
type proxy struct {
	*toxiproxy.Proxy
	t *testing.T
}

// startProxy starts a proxy in front of the host and port of a URL. It is stopped when the test
// ends.
func startProxy(t *testing.T, upstream string) *proxy {
	t.Helper()
	target, err := url.Parse(upstream)
	if err != nil {
		t.Fatal(err)
	}
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	listen := "127.0.0.1:" + freePort(t)
	p := &proxy{toxiproxy.NewProxy(server, t.Name(), listen, target.Host), t}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p
}

// through is the same URL with the proxy as its host.
func (p *proxy) through(upstream string) string {
	target, err := url.Parse(upstream)
	if err != nil {
		p.t.Fatal(err)
	}
	target.Host = p.Listen
	return target.String()
}

// slow makes every answer arrive later by d.
func (p *proxy) slow(d time.Duration) { p.addToxic("latency", "latency", int(d.Milliseconds())) }

// cut closes every connection once it has delivered so many more bytes of answers.
func (p *proxy) cut(bytes int) { p.addToxic("limit_data", "bytes", bytes) }

// addToxic adds one of toxiproxy's toxics.
func (p *proxy) addToxic(toxic, attribute string, value int) {
	p.t.Helper()
	text := fmt.Sprintf(`{"type": %q, "attributes": {%q: %d}}`, toxic, attribute, value)
	if _, err := p.Toxics.AddToxicJson(strings.NewReader(text)); err != nil {
		p.t.Fatal(err)
	}
}

// mend makes the proxy faultless again.
func (p *proxy) mend() { p.Toxics.ResetToxics(context.Background()) }
