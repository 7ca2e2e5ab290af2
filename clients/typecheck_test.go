package clients

import "testing"

// TestTypes has tsc read what uses auth.js. The types of auth.js are held to those of openapi.yaml.
func TestTypes(t *testing.T) {
	needNPM(t)
	for what, project := range map[string]string{
		"app":   "tsconfig.json",
		"types": "tsconfig.types.json",
	} {
		t.Run(what, func(t *testing.T) {
			run(t, "react", nil, "../node_modules/.bin/tsc", "--project", project)
		})
	}
}
