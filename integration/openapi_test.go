package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sort"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
)

// document is openapi.yaml, and what of it the tests have reached.
var document = loadDocument("../openapi.yaml")

type openAPI struct {
	doc     *openapi3.T
	err     error
	router  routers.Router
	reached sync.Map // "POST /auth/login 401" to true
	// elsewhere holds what the document says of the requests that no operation can list.
	elsewhere *openapi3.Operation
}

func loadDocument(file string) *openAPI {
	d := &openAPI{}
	if d.doc, d.err = openapi3.NewLoader().LoadFromFile(file); d.err != nil {
		return d
	}
	if d.err = d.doc.Validate(context.Background()); d.err != nil {
		return d
	}
	d.doc.Servers = nil // the tests' servers are at other addresses
	component := func(name string) *openapi3.ResponseRef { return d.doc.Components.Responses[name] }
	d.elsewhere = &openapi3.Operation{Responses: openapi3.NewResponses(
		openapi3.WithStatus(204, component("Preflight")),
		openapi3.WithStatus(404, component("NotFound")),
		openapi3.WithStatus(405, component("MethodNotAllowed")),
		openapi3.WithStatus(429, component("RateLimited")),
		openapi3.WithStatus(500, component("Internal")),
		openapi3.WithStatus(503, component("Unavailable")),
	)}
	d.router, d.err = gorillamux.NewRouter(d.doc)
	return d
}

// validate holds an answer to the document, and the request too unless it was refused as a bad one: the tests make many
// deliberately wrong requests, but never one that may be answered with success.
func (d *openAPI) validate(t testing.TB, req *http.Request, body []byte, a *answer) {
	t.Helper()
	if d.err != nil {
		t.Errorf("openapi.yaml: %v", d.err)
		return
	}
	ctx := context.Background()
	copied := req.Clone(ctx)
	copied.Body = io.NopCloser(bytes.NewReader(body))
	route, params, err := d.router.FindRoute(copied)
	place := ""
	switch {
	case errors.Is(err, routers.ErrPathNotFound) || errors.Is(err, routers.ErrMethodNotAllowed):
		if req.Method == http.MethodHead {
			return // HEAD goes where GET goes, without the body that could be validated
		}
		route, place = &routers.Route{Spec: d.doc, Operation: d.elsewhere}, "elsewhere"
	case err != nil:
		t.Errorf("%s: openapi.yaml: %v", a.sent, err)
		return
	default:
		place = route.Method + " " + route.Path
	}
	input := &openapi3filter.RequestValidationInput{Request: copied, PathParams: params, Route: route,
		Options: &openapi3filter.Options{MultiError: true, AuthenticationFunc: openapi3filter.NoopAuthenticationFunc}}
	if a.StatusCode < 400 && place != "elsewhere" {
		if err := openapi3filter.ValidateRequest(ctx, input); err != nil {
			t.Errorf("%s was answered with %d, but is no request of openapi.yaml: %v", a.sent, a.StatusCode, err)
		}
	}
	if err := openapi3filter.ValidateResponse(ctx, &openapi3filter.ResponseValidationInput{
		RequestValidationInput: input, Status: a.StatusCode, Header: a.Header, Body: io.NopCloser(bytes.NewReader(a.body)),
		Options: &openapi3filter.Options{IncludeResponseStatus: true, MultiError: true},
	}); err != nil {
		t.Errorf("%s: the answer %d is none of openapi.yaml: %v", a.sent, a.StatusCode, err)
	}
	d.reached.Store(fmt.Sprintf("%s %d", place, a.StatusCode), true)
}

// operations are all routes of the document, as "METHOD /path".
func (d *openAPI) operations() []string {
	all := []string{}
	for path, item := range d.doc.Paths.Map() {
		for method := range item.Operations() {
			all = append(all, method+" "+path)
		}
	}
	sort.Strings(all)
	return all
}

// TestOpenAPI comes after TestContract, in file order: it asks what of the document that suite has reached.
func TestOpenAPI(t *testing.T) {
	if document.err != nil {
		t.Fatal(document.err)
	}
	if !document.doc.IsOpenAPI31OrLater() {
		t.Error("the document is not OpenAPI 3.1")
	}
	t.Run("describes the contract's routes and no others", func(t *testing.T) {
		want := slices.Clone(contractRoutes)
		sort.Strings(want)
		if got := document.operations(); !slices.Equal(got, want) {
			t.Errorf("routes of the document: %q\nof the contract: %q", got, want)
		}
	})
	t.Run("every route and status was reached by the suite", func(t *testing.T) {
		if !contractRanWhole.Load() {
			t.Skip("the contract suite did not run as a whole")
		}
		expected := []string{}
		for path, item := range document.doc.Paths.Map() {
			for method, operation := range item.Operations() {
				for status := range operation.Responses.Map() {
					expected = append(expected, method+" "+path+" "+status)
				}
			}
		}
		for status := range document.elsewhere.Responses.Map() {
			expected = append(expected, "elsewhere "+status)
		}
		sort.Strings(expected)
		for _, one := range expected {
			if _, ok := document.reached.Load(one); !ok {
				t.Errorf("never reached: %s", one)
			}
		}
		t.Logf("%d routes with %d statuses", len(document.operations()), len(expected))
	})
}
