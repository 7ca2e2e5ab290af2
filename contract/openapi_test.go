package contract

import (
	"bytes"
	"context"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
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
	*openapi3.T
	err       error
	router    routers.Router
	elsewhere *openapi3.Operation // what it says of the requests that no operation can list
	reached   sync.Map            // "POST /auth/login 401" to true
}

func loadDocument(file string) *openAPI {
	d := &openAPI{}
	if d.T, d.err = openapi3.NewLoader().LoadFromFile(file); d.err != nil {
		return d
	}
	if d.err = d.Validate(context.Background()); d.err != nil {
		return d
	}
	d.Servers = nil // the tests' servers are at other addresses
	response := func(status int, component string) openapi3.NewResponsesOption {
		return openapi3.WithStatus(status, d.Components.Responses[component])
	}
	d.elsewhere = &openapi3.Operation{Responses: openapi3.NewResponses(
		response(204, "Preflight"),
		response(404, "NotFound"),
		response(405, "MethodNotAllowed"),
		response(429, "RateLimited"),
		response(500, "Internal"),
		response(503, "Unavailable"),
	)}
	d.router, d.err = gorillamux.NewRouter(d.T)
	return d
}

// validate holds an answer to the document, and the request as well if it was answered with
// success: the tests send many that are deliberately wrong.
func (d *openAPI) validate(a *answer, req *http.Request) {
	if d.err != nil {
		a.server.Fatalf("openapi.yaml: %v", d.err)
	}
	ctx := context.Background()
	copied := req.Clone(ctx)
	copied.Body = io.NopCloser(bytes.NewReader(a.asked.body))
	route, params, err := d.router.FindRoute(copied)
	place := "elsewhere"
	if err == nil {
		place = route.Method + " " + route.Path
	} else if req.Method == http.MethodHead {
		return // it goes where GET goes, without the body that could be validated
	} else {
		route = &routers.Route{Spec: d.T, Operation: d.elsewhere}
	}
	input := &openapi3filter.RequestValidationInput{
		Request:    copied,
		PathParams: params,
		Route:      route,
		Options: &openapi3filter.Options{
			IncludeResponseStatus: true,
			MultiError:            true,
			AuthenticationFunc:    openapi3filter.NoopAuthenticationFunc,
		},
	}
	if a.StatusCode < 400 && place != "elsewhere" {
		err := openapi3filter.ValidateRequest(ctx, input)
		a.expect(err == nil, "a success for what is no request of openapi.yaml: %v", err)
	}
	err = openapi3filter.ValidateResponse(ctx, &openapi3filter.ResponseValidationInput{
		RequestValidationInput: input,
		Status:                 a.StatusCode,
		Header:                 a.Header,
		Body:                   io.NopCloser(bytes.NewReader(a.body)),
		Options:                input.Options,
	})
	a.expect(err == nil, "it is no answer of openapi.yaml: %v", err)
	d.reached.Store(place+" "+strconv.Itoa(a.StatusCode), true)
}

// described are the operations of the document, and what it says elsewhere.
func (d *openAPI) described() map[string]*openapi3.Operation {
	all := map[string]*openapi3.Operation{"elsewhere": d.elsewhere}
	for path, item := range d.Paths.Map() {
		for method, operation := range item.Operations() {
			all[method+" "+path] = operation
		}
	}
	return all
}

// TestOpenAPI comes after TestContract, in the order of the files: it asks what of the document
// that suite has reached.
func TestOpenAPI(t *testing.T) {
	if document.err != nil || !document.IsOpenAPI31OrLater() {
		t.Fatalf("no document of OpenAPI 3.1: %v", document.err)
	}
	t.Run("describes the contract's routes and no others", func(t *testing.T) {
		got := slices.Sorted(maps.Keys(document.described()))
		if want := append(slices.Sorted(maps.Keys(routes)), "elsewhere"); !slices.Equal(got, want) {
			t.Errorf("the routes are %q, want %q", got, want)
		}
	})
	t.Run("every route and status was reached by the suite", func(t *testing.T) {
		if !testedWhole.Load() {
			t.Skip("TestContract did not run as a whole")
		}
		for route, operation := range document.described() {
			for status := range operation.Responses.Map() {
				_, reached := document.reached.Load(route + " " + status)
				if !reached && status != "503" { // of outages, which the root module tests
					t.Errorf("never reached: %s %s", route, status)
				}
			}
		}
	})
}
